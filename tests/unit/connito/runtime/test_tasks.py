from __future__ import annotations

import ast
import asyncio
from pathlib import Path

from connito.runtime.tasks import end_tasks

from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[4]


async def test_a_task_that_loses_its_first_cancellation_ends_all_the_same() -> None:
    lost = 0

    async def stubborn() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                lost += 1
                if lost == 2:
                    raise

    async def fails() -> None:
        raise ZeroDivisionError

    tasks = [asyncio.create_task(stubborn()), asyncio.create_task(fails())]
    await asyncio.sleep(0)
    async with asyncio.timeout(PATIENCE):
        await end_tasks(tasks)
    assert lost == 2
    assert all(task.done() for task in tasks)


# Futures, timers, a run of the platform, and the signal that begins an orderly stop: no task to be waited for.
CANCELS = {
    "services/console/trial.py: late.cancel",
    "shared/connito/bus/connection.py: failed.cancel",
    "shared/connito/bus/consume.py: handle.cancel",
    "shared/connito/bus/consume.py: self.later.pop(lane).cancel",
    "shared/connito/cli/job.py: client.job.cancel",
    "shared/connito/local/processes.py: self._ready.cancel",
    "shared/connito/local/supervisor.py: self.failed.cancel",
    "shared/connito/local/up.py: client.job.cancel",
    "shared/connito/local/up.py: task.cancel",
    "shared/connito/runtime/tasks.py: task.cancel",
    "shared/connito/runtime/compute.py: telling.cancel",
    "shared/connito/runtime/waiting.py: gone.forget.cancel",
    "shared/connito/service/engine.py: self._failure.cancel",
    "shared/connito/service/probes.py: self._deadline.cancel",
}


def test_tasks_are_ended_by_end_tasks_alone() -> None:
    """A cancellation that is sent once may be lost, and the task would go on for ever."""
    found = set()
    for folder in ("shared/connito", "services"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cancel":
                    found.add(f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}")
    assert found == CANCELS
