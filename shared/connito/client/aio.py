"""`client.aio`: the verbs of a client to be awaited. There is no second copy of them: each runs in a thread."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any


class Aio:
    """The public methods of an object, awaitable; those that yield are read with `async for`. They raise what it raises.

    A call whose wait is cancelled goes on to its end in its thread.
    """

    def __init__(self, of: object) -> None:
        """Wrap `of`; its attributes that have verbs of their own are wrapped too."""
        self._of = of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        found = getattr(self._of, name)
        if not callable(found):
            return Aio(found)
        return _streamed(found) if inspect.isgeneratorfunction(found) else _awaited(found)

    def __dir__(self) -> list[str]:
        """Return the verbs, for completion."""
        return [name for name in dir(self._of) if not name.startswith("_")]


def _awaited(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    async def run(*arguments: Any, **named: Any) -> Any:
        return await asyncio.to_thread(call, *arguments, **named)

    return run


def _streamed(call: Callable[..., Iterator[Any]]) -> Callable[..., Any]:
    @functools.wraps(call)
    async def run(*arguments: Any, **named: Any) -> AsyncIterator[Any]:
        loop, answers, left = asyncio.get_running_loop(), asyncio.Queue[tuple[str, Any]](), threading.Event()
        # Not of the loop's own threads: it would wait for a stream whose next answer may be hours away.
        reading = (call(*arguments, **named), loop, answers, left)
        threading.Thread(target=_read, args=reading, daemon=True).start()
        try:
            while (found := await answers.get())[0] == "answer":
                yield found[1]
            if found[1] is not None:
                raise found[1]
        finally:
            left.set()

    return run


def _read(
    source: Iterator[Any],
    loop: asyncio.AbstractEventLoop,
    answers: asyncio.Queue[tuple[str, Any]],
    left: threading.Event,
) -> None:
    """Pass answers on until they end, or the one who reads has left."""

    def tell(kind: str, value: object) -> None:
        if not left.is_set() and not loop.is_closed():
            loop.call_soon_threadsafe(answers.put_nowait, (kind, value))

    try:
        for answer in source:
            if left.is_set():
                return
            tell("answer", answer)
    except Exception as error:
        tell("end", error)
    else:
        tell("end", None)
