from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from connito.runtime import compute
from connito.runtime.compute import COMPUTE, ComputeBudget, in_thread, multiplies_bf16
from connito.runtime.waiting import WAITING

from tests.support.waiting import PATIENCE, until

HOLDER = """
import asyncio, sys
from pathlib import Path
from connito.runtime.compute import ComputeBudget

async def main():
    async with ComputeBudget(Path(sys.argv[1]), 1).slot("test"):
        print("held", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("slots", [1, 2])
async def test_no_more_at_once_than_slots_and_everyone_gets_a_turn(tmp_path: Path, slots: int) -> None:
    inside = peak = turns = 0
    full = asyncio.Event()

    async def work() -> None:
        nonlocal inside, peak, turns
        # Each worker as if in a process of its own: budgets share nothing but the folder.
        async with ComputeBudget(tmp_path, slots).slot("test"):
            inside += 1
            peak = max(peak, inside)
            if inside == slots:
                full.set()
            await full.wait()
            inside -= 1
            turns += 1

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(work() for _ in range(6)))
    assert (peak, turns) == (slots, 6)


async def test_long_work_lets_others_go_first(tmp_path: Path) -> None:
    """Without one that waits it goes on at once; with one, it computes again when that is done."""
    order: list[str] = []

    async def other() -> None:
        async with ComputeBudget(tmp_path, 1).slot("other"):
            order.append("other")

    async with asyncio.timeout(PATIENCE), ComputeBudget(tmp_path, 1).slot("long") as give_way:
        await asyncio.to_thread(give_way, bool)
        order.append("long")
        waiting = asyncio.ensure_future(other())
        await asyncio.wait([waiting], timeout=0.2)
        assert order == ["long"]
        await asyncio.to_thread(give_way, bool)
        order.append("long")
        again = asyncio.ensure_future(other())
        await asyncio.wait([again], timeout=0.2)
        assert order == ["long", "other", "long"], "it holds its slot again"
    await again


@pytest.mark.parametrize(("seconds", "late"), [(0.016, 0.003), (0.2, 0.03), (3.0, 0.031)])
async def test_who_waits_a_moment_is_told_within_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, late: float
) -> None:
    """Steps of small models are shorter than a look every 30 ms, which four miners would mostly wait for."""
    now, holder, pause = 0.0, ComputeBudget(tmp_path, 1), asyncio.sleep

    async def sleep(delay: float) -> None:
        nonlocal now
        now += delay
        if now >= seconds:
            free.set()
        await pause(0)

    free = asyncio.Event()

    async def hold() -> None:
        async with holder.slot("test"):
            held.set()
            await free.wait()

    held = asyncio.Event()
    monkeypatch.setattr("connito.runtime.compute.time", SimpleNamespace(monotonic=lambda: now))
    holding = asyncio.ensure_future(hold())
    await held.wait()
    monkeypatch.setattr("connito.runtime.compute.asyncio.sleep", sleep)
    await _take(ComputeBudget(tmp_path, 1))
    await holding
    assert seconds <= now <= seconds + late


async def test_who_gave_way_and_is_told_to_stop_waits_no_longer(tmp_path: Path) -> None:
    """A service that ends is not held up by what another one computes."""
    stop, ended = threading.Event(), asyncio.Event()

    async def other() -> None:
        async with ComputeBudget(tmp_path, 1).slot("other"):
            stop.set()
            await ended.wait()

    async with asyncio.timeout(PATIENCE), ComputeBudget(tmp_path, 1).slot("long") as give_way:
        waiting = asyncio.ensure_future(other())
        await asyncio.wait([waiting], timeout=0.2)
        await asyncio.to_thread(give_way, stop.is_set)
        assert not waiting.done()
        ended.set()
        await waiting


async def test_no_folder_no_limit() -> None:
    budget, both = ComputeBudget(None), False
    async with asyncio.timeout(PATIENCE), budget.slot("a"), budget.slot("b"):
        both = True
    assert both


async def test_the_kernel_gives_back_what_a_killed_process_held(tmp_path: Path) -> None:
    holder = await asyncio.create_subprocess_exec(sys.executable, "-c", HOLDER, tmp_path, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert await holder.stdout.readline() == b"held\n"
    waiting = asyncio.ensure_future(_take(ComputeBudget(tmp_path, 1)))
    await asyncio.wait([waiting], timeout=0.2)
    assert not waiting.done()
    holder.kill()
    await holder.wait()
    async with asyncio.timeout(PATIENCE):
        await waiting


async def test_who_waits_long_says_who_computes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is stopped holds up every other process of the machine, and is named."""
    monkeypatch.setattr("connito.runtime.compute.TELL_AFTER", 0.01)
    budget = ComputeBudget(tmp_path, 1)
    async with budget.slot("test"):
        waiting = asyncio.ensure_future(_take(budget))
        await until(lambda: any(entry.dependency == COMPUTE for entry in WAITING.entries()))
        (entry,) = (entry for entry in WAITING.entries() if entry.dependency == COMPUTE)
        assert entry.error == f"the cores of this machine are held by processes {os.getpid()}"
    await waiting
    assert not any(entry.dependency == COMPUTE for entry in WAITING.entries())


async def test_given_back_after_an_error_and_after_a_cancelled_wait(tmp_path: Path) -> None:
    budget = ComputeBudget(tmp_path, 1)
    with pytest.raises(ZeroDivisionError):
        async with budget.slot("test"):
            raise ZeroDivisionError
    async with budget.slot("test"):
        waiting = asyncio.ensure_future(_take(budget))
        await asyncio.wait([waiting], timeout=0.1)
        waiting.cancel()
        await asyncio.wait([waiting])
    async with asyncio.timeout(PATIENCE):
        await _take(budget)


async def test_a_cancelled_thread_is_told_and_waited_for() -> None:
    began, ended = threading.Event(), threading.Event()

    def work(stop: threading.Event) -> None:
        began.set()
        stop.wait(10)
        time.sleep(0.05)
        ended.set()

    task = asyncio.ensure_future(in_thread(work))
    await asyncio.to_thread(began.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def _take(budget: ComputeBudget) -> None:
    async with budget.slot("test"):
        pass


async def test_a_job_that_wants_every_core_waits_for_one_that_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connito.runtime.compute.usable_cores", lambda: 2)
    wide, narrow = ComputeBudget(tmp_path, 1), ComputeBudget(tmp_path, 2)
    async with narrow.slot("a"):
        waiting = asyncio.ensure_future(_take(wide))
        await asyncio.wait([waiting], timeout=0.2)
        assert not waiting.done()
    async with asyncio.timeout(PATIENCE):
        await waiting


@pytest.mark.parametrize(
    ("said", "has"),
    [
        ("model name\t: A\nflags\t\t: fpu avx512_bf16 vnni\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("model name\t: bf16\n", False),
        ("", False),
    ],
)
def test_a_processor_says_whether_it_multiplies_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, has: bool
) -> None:
    monkeypatch.setattr("connito.runtime.compute.CPUINFO", tmp_path / "cpuinfo")
    assert not multiplies_bf16()
    (tmp_path / "cpuinfo").write_text(said)
    assert multiplies_bf16() is has


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this C library keeps no memory back, or cannot give it"
)
async def test_memory_that_a_computation_left_free_goes_back_to_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connito.runtime.compute.LONG_SECONDS", -1.0)
    process, blocks = psutil.Process(), [bytes(64 << 10) for _ in range(2000)]
    async with ComputeBudget(tmp_path).slot("train"):
        full = process.memory_info().rss
        # The last one keeps the heap from shrinking by itself.
        del blocks[:-1]
    assert process.memory_info().rss < full - (64 << 20)


@pytest.mark.parametrize(
    ("granted", "cores"), [("max 100000", 8), ("150000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), ("", 8)]
)
def test_a_container_uses_the_cores_that_it_is_granted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granted: str, cores: int
) -> None:
    """A pod on a large node is throttled for most of each period by threads that it has no share for."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(compute, "CPU_MAX", tmp_path / "cpu.max")
    if granted:
        compute.CPU_MAX.write_text(granted + "\n")
    threads = list[int]()
    torch = SimpleNamespace(get_num_threads=lambda: 8, set_num_threads=threads.append)
    monkeypatch.setitem(sys.modules, "torch", torch)
    compute.set_threads(0)
    compute.set_threads(3)
    assert (compute.usable_cores(), threads) == (cores, [cores, 3])
