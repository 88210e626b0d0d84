from __future__ import annotations

import asyncio

from connito.runtime.tasks import end_tasks

from tests.support.waiting import PATIENCE


async def test_a_task_that_loses_its_first_cancellation_ends_all_the_same():
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
