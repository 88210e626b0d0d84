"""An event loop whose time passes only when nobody has anything to do, and processes that it can stop and go on with."""

from __future__ import annotations

import asyncio
import selectors
from asyncio import Handle, TimerHandle
from collections.abc import Callable
from concurrent.futures import Executor
from contextvars import Context, ContextVar, copy_context
from random import Random
from typing import Any, TypeVar, TypeVarTuple

Args = TypeVarTuple("Args")
R = TypeVar("R")

EPOCH = 1_800_000_000.0


class DeadlockError(Exception):
    """Everybody waits, and nothing is going to happen."""


class Process:
    """What runs on a machine of its own from a start to its end; tasks belong to the process that they were started in."""

    def __init__(self, name: str, rng: Random) -> None:
        self.name, self.rng = name, rng
        self.dead = self.paused = False
        self._backlog: list[tuple[Callable[..., Any], tuple[Any, ...], Context, TimerHandle | None]] = []

    def wait(self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context, timer: Any = None) -> None:
        self._backlog.append((callback, args, context, timer))

    def go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        """Continue after a pause: what had come due meanwhile happens now, in its order."""
        self.paused, waiting, self._backlog = False, self._backlog, []
        for callback, args, context, timer in waiting:
            loop.call_soon(_unless_cancelled, timer, callback, args, context=context)


PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def _unless_cancelled(timer: TimerHandle | None, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
    if timer is None or not timer.cancelled():
        callback(*args)


class _Selector(selectors.SelectSelector):
    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise DeadlockError("nobody waits for a time")
        self.loop.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """`now` is the time since the start in seconds. Blocking work takes some of it and no thread."""

    def __init__(self) -> None:
        self.now = 0.0
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)
        self._clock_resolution = 1e-6
        # What happens between the machines belongs to none of them.
        self.between = Context()

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None) -> Handle:
        context = context if context is not None else copy_context()
        process = context.get(PROCESS)
        if process is not None and process.paused:
            process.wait(callback, args, context)
            return Handle(callback, args, self, context)
        return super().call_soon(callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[[*Args], object], *args: *Args, context: Context | None = None
    ) -> TimerHandle:
        context = context if context is not None else copy_context()
        process = context.get(PROCESS)
        if process is None:
            return super().call_at(when, callback, *args, context=context)
        timer: list[TimerHandle] = []

        def due() -> None:
            if process.paused:
                process.wait(callback, args, context, timer[0])
            else:
                callback(*args)

        timer.append(super().call_at(when, due, context=context))
        return timer[0]

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Args], R], *args: *Args) -> asyncio.Future[R]:
        """Do it now; the caller learns of it a little later, or never when its process has died."""
        future: asyncio.Future[R] = self.create_future()
        process = PROCESS.get()
        delay = 0.0 if process is None else process.rng.uniform(0.001, 0.03)
        try:
            self.call_later(delay, _give, future, func(*args), None)
        except Exception as error:
            self.call_later(delay, _give, future, None, error)
        return future


def _give(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if not future.done():
        future.set_result(result) if error is None else future.set_exception(error)
