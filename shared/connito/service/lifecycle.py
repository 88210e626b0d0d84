"""Run a service's tasks side by side until the first of them ends or the service is told to stop, then end them all."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from connito.runtime.tasks import end_tasks

T = TypeVar("T")


class Lifecycle:
    """`async with Lifecycle(stop) as life:` ends every task that was started when the block is left, however it is left.

    A service starts what lasts, waits for what it needs (`finishes`), says that it is ready, and waits for the end.
    """

    def __init__(self, stop: asyncio.Event) -> None:
        self._stop = stop
        self._lasting: list[asyncio.Task[Any]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await end_tasks(self._lasting)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start what lasts as long as the service: when it ends, so does the service."""
        task = asyncio.create_task(work)
        self._lasting.append(task)
        return task

    async def finishes(self, work: Coroutine[Any, Any, object]) -> bool:
        """Run `work` to its end; False when the service ends first. Raises what ended it, or what `work` raises."""
        step, stopping = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({*self._lasting, step, stopping}, return_when=asyncio.FIRST_COMPLETED)
            for task in (*self._lasting, step):
                if task.done():
                    task.result()
            return step.done() and not self._stop.is_set()
        finally:
            await end_tasks((step, stopping))

    async def over(self) -> None:
        """Wait until the service is told to stop or a lasting task ends. Raises what that task raised."""
        await self.finishes(self._stop.wait())
