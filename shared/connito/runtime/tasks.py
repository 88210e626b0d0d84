"""Asyncio tasks: ending them so that they have ended, and waiting for one where nothing else is asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


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


def blocking(work: Coroutine[Any, Any, T]) -> T:
    """Return what a coroutine returns, from code that is not asynchronous itself, also inside a running loop: every cell of
    a notebook is. There it runs in a thread of its own, and whoever interrupts the cell cancels it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    begun: Future[Callable[[], object]] = Future()
    ended = threading.Event()

    async def cancellable() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        begun.set_result(partial(loop.call_soon_threadsafe, task.cancel))
        try:
            return await work
        finally:
            ended.set()

    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(asyncio.run, cancellable()).result()
        except KeyboardInterrupt:
            begun.result()()
            # The pool waits for threads that it knows; interrupted while it starts one, it does not know it.
            ended.wait()
            raise
