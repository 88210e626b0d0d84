"""Ending asyncio tasks so that they have ended."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any


async def end_tasks(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until all of them are over; what they raise is dropped.

    Cancels more than once: `asyncio.wait_for` before Python 3.12, on which the broker's client library stands, loses a
    cancellation that arrives together with the result it waits for, and the task would go on for ever.
    """
    everything = list(tasks)
    while pending := [task for task in everything if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.5)
    for task in everything:
        if not task.cancelled():
            task.exception()
