"""Start processes that end with the supervisor, however each came to be."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, Self

from connito.errors import Fatal
from connito.local.fork_server import PACKET_BYTES

# So many preloaded processes in a row may be lost to one program: each takes seconds to import, in which it may be killed.
_ATTEMPTS = 6


class _LostError(Exception):
    """The preloaded process ended before it forked."""


@dataclass(frozen=True)
class Program:
    """A program to run: a module, its environment, and the file to which its output is appended."""

    name: str
    module: str
    env: Mapping[str, str]
    log: Path
    cwd: Path
    arguments: Sequence[str] = ()


@dataclass
class Process:
    """A running process, leader of its own process group. `exited` resolves to its exit code (negative: a signal)."""

    name: str
    pid: int
    exited: asyncio.Future[int] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def signal(self, number: signal.Signals) -> None:
        """Signal the whole group. A process that has already ended is left alone."""
        if not self.exited.done():
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def stop(self, grace_seconds: float) -> int:
        """Stop the process: SIGTERM, time to drain, then SIGKILL. Return the exit code."""
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(asyncio.shield(self.exited), grace_seconds)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            return await self.exited


class Launcher(Protocol):
    """A way to start programs."""

    async def start(self, program: Program, *, stdout: int | None = None) -> Process: ...


class PlainLauncher:
    """Starts a fresh interpreter per program: for services without torch, which are up in a second."""

    def __init__(self) -> None:
        self._watchers: set[asyncio.Task[None]] = set()

    async def start(self, program: Program, *, stdout: int | None = None) -> Process:
        """Start `program`. Its stdout goes to `stdout` if given, else with stderr into the log."""
        with program.log.open("ab") as log:
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "connito.local.bound_process", str(os.getpid()), program.module, *program.arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=log if stdout is None else stdout, stderr=log,
                env=dict(program.env), cwd=program.cwd, start_new_session=True,
            )  # fmt: skip
        process = Process(program.name, child.pid)

        async def watch() -> None:
            process.exited.set_result(await child.wait())

        task = asyncio.create_task(watch())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)
        return process


class ForkLauncher:
    """Forks programs from the preloaded process of `connito.local.fork_server`, and starts that one again when it dies."""

    def __init__(self, log: Path, env: Mapping[str, str], modules: Sequence[str], begun: Callable[[int], None]) -> None:
        self._log, self._env, self._modules, self._begun = log, env, modules, begun
        self.losses = 0
        self._beginning = asyncio.Lock()
        self._starting: dict[str, asyncio.Future[int]] = {}
        self._running: dict[int, Process] = {}
        self._early: dict[int, int] = {}
        self._process: asyncio.subprocess.Process
        self._control: socket.socket
        self._ready: asyncio.Future[None]

    @classmethod
    async def open(
        cls,
        log: Path,
        env: Mapping[str, str],
        modules: Sequence[str] = (),
        begun: Callable[[int], None] = lambda pid: None,
    ) -> Self:
        """Start the preloaded process; it imports while the caller goes on. `begun` gets the id of each one."""
        launcher = cls(log, env, modules, begun)
        await launcher._begin()
        return launcher

    @property
    def pid(self) -> int:
        """Return the id of the preloaded process."""
        return self._process.pid

    async def _begin(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        for number in (ours, theirs):
            number.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET_BYTES)
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-P", "-m", "connito.local.fork_server", str(os.getpid()), str(theirs.fileno()), *self._modules,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=(theirs.fileno(),),
                # One thread per BLAS, so that importing starts none and forking stays safe.
                env={**self._env, "OPENBLAS_NUM_THREADS": "1"}, start_new_session=True,
            )  # fmt: skip
        theirs.close()
        self._control, self._ready = ours, asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive)
        self._begun(self._process.pid)

    async def start(self, program: Program, *, stdout: int | None = None) -> Process:
        """Fork `program`. Raises `Fatal` when no preloaded process can be kept alive."""
        for _ in range(_ATTEMPTS):
            async with self._beginning:
                if self._control.fileno() < 0:
                    code = await self._process.wait()
                    # What ends by itself while it imports would end again; what was killed would not.
                    if code >= 0 and self._ready.exception() is not None:
                        raise self._gone()
                    await self._begin()
            try:
                return await self._fork(program, stdout)
            except _LostError:
                continue
        raise self._gone()

    async def _fork(self, program: Program, stdout: int | None) -> Process:
        await asyncio.shield(self._ready)
        starting = self._starting[program.name] = asyncio.get_running_loop().create_future()
        with program.log.open("ab") as log:
            self._send(_request(program), log, stdout)
            pid = await starting
        process = Process(program.name, pid)
        if pid in self._early:
            process.exited.set_result(self._early.pop(pid))
        else:
            self._running[pid] = process
        return process

    async def close(self) -> None:
        """Close our end; the preloaded process kills what it forked and ends."""
        if self._control.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._control.fileno())
            self._control.close()
        try:
            await asyncio.wait_for(self._process.wait(), 5)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        if not self._ready.done():
            self._ready.cancel()

    def _send(self, request: dict[str, Any], log: IO[bytes], stdout: int | None) -> None:
        descriptors = [log.fileno() if stdout is None else stdout, log.fileno()]
        try:
            socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
        except OSError as error:
            raise _LostError from error

    def _receive(self) -> None:
        try:
            data = self._control.recv(PACKET_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._lost()
            return
        event = json.loads(data)
        if event["event"] == "ready":
            self._ready.set_result(None)
        elif event["event"] == "started":
            self._starting.pop(event["name"]).set_result(event["pid"])
        elif event["event"] == "exited":
            self._ended(event["pid"], event["code"])

    def _ended(self, pid: int, code: int) -> None:
        process = self._running.pop(pid, None)
        if process is None:  # It ended before `start` came to register it.
            self._early[pid] = code
        elif not process.exited.done():
            process.exited.set_result(code)

    def _lost(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control.fileno())
        self._control.close()
        if not self._ready.done():
            self._ready.set_exception(_LostError())
            self._ready.exception()  # Retrieved here, so that nobody has to wait for it.
        self.losses += 1
        self._early.clear()
        for waiting in self._starting.values():
            waiting.set_exception(_LostError())
        self._starting.clear()
        for process in self._running.values():
            if not process.exited.done():
                process.exited.set_result(-signal.SIGKILL)
        self._running.clear()

    def _gone(self) -> Fatal:
        return Fatal(f"the process that forks the model services ended; its log is {self._log}")


def _request(program: Program) -> dict[str, Any]:
    return {
        "op": "spawn",
        "name": program.name,
        "module": program.module,
        "argv": list(program.arguments),
        "env": dict(program.env),
        "cwd": str(program.cwd),
    }
