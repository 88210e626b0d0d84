"""Waiting for a coroutine from code that is not asynchronous, also where a loop runs already."""

from __future__ import annotations

import asyncio
import signal
import threading
from pathlib import Path

import connito
import pytest
from connito.runtime.tasks import blocking


async def answer(value: int) -> int:
    if value < 0:
        raise ValueError("negative")
    return value


def test_without_a_loop() -> None:
    assert blocking(answer(3)) == 3


async def test_inside_a_running_loop_as_every_cell_of_a_notebook_is() -> None:
    assert blocking(answer(4)) == 4
    with pytest.raises(ValueError, match="negative"):
        blocking(answer(-1))


async def test_interrupting_a_cell_cancels_the_work_and_waits_for_its_end() -> None:
    steps: list[str] = []

    async def work() -> None:
        steps.append("begun")
        try:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            await asyncio.Event().wait()
        finally:
            steps.append("ended")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            blocking(work())
    finally:
        signal.signal(signal.SIGINT, before)
    assert steps == ["begun", "ended"]


def test_nothing_that_is_called_from_python_needs_that_no_loop_runs() -> None:
    """`asyncio.run` refuses inside a running loop: only what is a process of its own may call it, and this module."""
    root = Path(connito.__file__).parent
    found = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if "asyncio.run(" in path.read_text() and not path.is_relative_to(root / "cli")
    }
    assert found == {"curation/serving/run.py", "local/up.py", "runtime/tasks.py", "service/runner.py"}
    # There, `main` of the detached process.
    assert (root / "local/up.py").read_text().partition("def main()")[0].count("asyncio.run(") == 0
