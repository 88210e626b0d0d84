"""The verbs of a client, awaited: the same ones, in threads, with their errors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from connito import Client
from connito.client.aio import Aio
from connito.errors import Invalid, Retry


class Clock:
    """A verb that waits until another thread lets it go on, one that yields, and one that fails."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.closed = threading.Event()

    def wait(self, seconds: float) -> bool:
        """Wait for the other."""
        return self.go.wait(seconds)

    def ticks(self, count: int, why: str = "") -> Iterator[int]:
        """Yield, then fail with `why`, or wait for the other."""
        try:
            yield from range(count)
            if why:
                raise Retry(why)
            self.go.wait(30)
            yield count
        finally:
            self.closed.set()


async def test_a_verb_that_waits_leaves_the_loop_to_others() -> None:
    clock = Clock()
    waiting = asyncio.ensure_future(Aio(clock).wait(seconds=20))
    await asyncio.sleep(0)
    clock.go.set()
    assert await asyncio.wait_for(waiting, 10) is True


async def test_answers_that_go_on_come_in_order_and_end_with_their_error() -> None:
    ticks = aiter(Aio(Clock()).ticks(3, why="gone"))
    assert [await anext(ticks) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Retry, match="gone"):
        await anext(ticks)


def test_who_leaves_a_stream_is_not_kept_by_it() -> None:
    clock = Clock()

    async def leave() -> None:
        ticks = aiter(Aio(clock).ticks(1))
        assert await anext(ticks) == 0
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(ticks), 0.05)

    began = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - began < 10  # The next answer is 30 s away.
    clock.go.set()
    assert clock.closed.wait(10)


async def test_every_verb_of_a_client_has_its_twin_with_its_errors() -> None:
    client = Client()
    for of, twin in ((client.job, client.aio.job), (client.library, client.aio.library)):
        verbs = [name for name in dir(of) if not name.startswith("_")]
        assert dir(twin) == verbs
        for name in verbs:
            assert getattr(twin, name).__doc__ == getattr(of, name).__doc__
    with pytest.raises(Invalid, match="library='host:port'"):
        await client.aio.library.list()
    with pytest.raises(AttributeError):
        _ = client.aio.job.nonsense
