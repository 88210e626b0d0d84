"""A machine-wide budget for heavy computation: at most so many torch jobs at once, whatever process they are in.

Oversubscribed cores are not shared but lost: three processes with two threads each on two cores ran 20 times slower.
A slot is made of cores, and a core is a lock on a file: budgets with different numbers of slots that share a folder
share the cores, and the kernel gives a core back when its holder is killed.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import itertools
import math
import os
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from connito.errors import Retry
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.waiting import WAITING

log = get_logger("compute")

R = TypeVar("R")

# Microseconds of processors in a period, and the period: what a container may use.
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")

# In the line everybody looks equally often, or who came last would come first. Its head, who looks alone, does so after an eighth
# of the time that it has waited, between these: most steps of a small model are over within moments.
_IN_LINE, _SOONEST, _LATEST = 0.01, 0.001, 0.03
# A wait that lasts so many seconds is shown, as one for this: miners that take turns wait for minutes, and nothing is wrong.
TELL_AFTER, FORGET_AFTER, COMPUTE = 300.0, 86400.0, "compute"
_NUMBERS = itertools.count()
# A computation of this length has left free memory behind that is worth giving back.
LONG_SECONDS = 1.0
# What a processor that multiplies in bfloat16 says of itself: Intel's and AMD's, then ARM's.
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
CPUINFO = Path("/proc/cpuinfo")


class ComputeBudget:
    """`async with budget.slot("train"):` waits for one of `slots`. Without a folder there is no limit.

    Those who wait line up: only the holder of the queue lock looks for a free slot, so a service that computes in a
    tight loop cannot starve the others.
    """

    def __init__(self, folder: Path | None, slots: int = 1) -> None:
        cores = max(usable_cores(), slots)
        self._folder, self._cores, self._cores_per_slot = folder, cores, cores // slots
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @asynccontextmanager
    async def slot(self, purpose: str) -> AsyncIterator[Callable[[Callable[[], bool]], None]]:
        """Hold a slot. The wait is measured under `purpose`; the event loop stays free meanwhile.

        Long work calls what it is given now and then, in its own thread: it lets those who wait go first, and waits for its
        turn unless it is told to stop.
        """
        if self._folder is None:
            yield lambda _: None
            return
        began, what = time.monotonic(), f"compute {purpose} {next(_NUMBERS)}"
        telling = asyncio.get_running_loop().call_later(TELL_AFTER, self._tell, what)
        try:
            queue = await self._lock(["queue"], 1, lambda _: _IN_LINE)
            try:
                held = await self._lock(self._names(), self._cores_per_slot, lambda waited: waited / 8)
            finally:
                _release(queue)
        finally:
            telling.cancel()
            WAITING.end(what)
        metrics.COMPUTE_WAIT_SECONDS.labels(purpose).observe(time.monotonic() - began)
        began = time.monotonic()
        try:
            yield partial(self._give_way, held)
        finally:
            _release(held)
            if time.monotonic() - began > LONG_SECONDS:
                await asyncio.to_thread(give_back_memory)

    def _give_way(self, held: list[int], stopped: Callable[[], bool]) -> None:
        """Release the cores, if somebody waits for any, and line up again until `stopped`. Blocking."""
        if (queue := self._try("queue")) is not None:
            _release([queue])
            return
        while held:
            _release([held.pop()])
        while (queue := self._try("queue")) is None:
            if stopped():
                return
            time.sleep(_IN_LINE)
        try:
            while not stopped():
                for name in self._names():
                    if len(held) < self._cores_per_slot and (core := self._try(name)) is not None:
                        held.append(core)
                if len(held) == self._cores_per_slot:
                    return
                time.sleep(_IN_LINE)
        finally:
            _release([queue])

    def _names(self) -> list[str]:
        return [f"core-{number}" for number in range(self._cores)]

    def _tell(self, what: str) -> None:
        """Say that somebody else computes here, and who: one that is stopped or hangs holds up everybody."""
        assert self._folder is not None
        holders = set[str]()
        for path in self._folder.glob("core-*"):
            with suppress(OSError):
                holders.update(path.read_text().split())
        processes = ", ".join(sorted(holders, key=len)) or "that are not named"
        error = Retry(f"the cores of this machine are held by processes {processes}", dependency=COMPUTE)
        # Where nobody reads the page of this process, its log says what it waits for.
        log.warning("waiting", action=what, waits_for=COMPUTE, error=str(error))
        WAITING.begin(what, error, "", FORGET_AFTER)

    async def _lock(self, names: list[str], count: int, pause: Callable[[float], float]) -> list[int]:
        """Lock `count` of the files as they come free; the descriptors hold the locks until they are closed. `pause`: until the
        next look, by the seconds that were waited.
        """
        held: dict[str, int] = {}
        began = time.monotonic()
        try:
            while True:
                for name in names:
                    if name not in held and (descriptor := self._try(name)) is not None:
                        held[name] = descriptor
                        if len(held) == count:
                            return list(held.values())
                await asyncio.sleep(min(_LATEST, max(_SOONEST, pause(time.monotonic() - began))))
        except BaseException:
            _release(list(held.values()))
            raise

    def _try(self, name: str) -> int | None:
        assert self._folder is not None
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(OSError):  # For whoever waits; a full disk keeps nobody from computing.
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            return descriptor
        os.close(descriptor)
        return None


def usable_cores() -> int:
    """Return cores that this process may use: those that it may run on, or as many of them as its container is granted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # No such file, or "max".
        quota, period = map(int, CPU_MAX.read_text().split())
        cores = min(cores, max(1, math.ceil(quota / period)))
    return cores


def give_back_memory() -> None:
    """Give memory that is free in this process back to the machine; the C library, where it is GNU's, keeps it otherwise."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def multiplies_bf16() -> bool:
    """Return whether this processor has instructions for products in bfloat16; without them they are slower than float32's."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return not BF16.isdisjoint(flags.split())


def machine_folder() -> Path:
    """Return the budget's folder that everything one user runs on this machine shares."""
    return Path(tempfile.gettempdir()) / f"connito-compute-{os.getuid()}"


def _release(descriptors: list[int]) -> None:
    # Unlock before closing: a child that was forked meanwhile has a copy of the descriptor, and with it the lock.
    for descriptor in descriptors:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


async def in_thread(work: Callable[[threading.Event], R]) -> R:
    """Run blocking work in a thread. When the caller is cancelled, the event given to `work` is set, and the thread is
    waited for: a slot is not given back, nor the process ended, while it still computes."""
    stop = threading.Event()
    task = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([task])
        raise


def load_torch(threads: int) -> None:
    """Import what computing with a model needs, ahead of its first use, and set the threads of a computation. Blocking."""
    import transformers.models.auto.modeling_auto  # noqa: F401 - imported for its side effect

    set_threads(threads)


def set_threads(threads: int) -> None:
    """Set the threads of a computation; 0: torch's own number, which does not know what a container is granted."""
    import torch

    torch.set_num_threads(threads or min(torch.get_num_threads(), usable_cores()))
