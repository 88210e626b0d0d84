"""What a worker has at hand does not grow with what lies in its queue."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.bus.connection import Connection
from connito.bus.consume import AHEAD, Worker
from connito.errors import Retry
from connito.wire.fact import Record

STORED = 700


class Queue:
    """A broker with as many messages as are asked for, each of a key of its own."""

    def __init__(self, stored: int = STORED) -> None:
        self.stored, self.given, self.acknowledged, self.kept_alive = stored, 0, 0, 0
        self.nc = self
        self.arrive: Callable[[Any], Awaitable[None]] | None = None

    def new_inbox(self) -> str:
        return "inbox"

    async def subscribe(self, inbox: str, cb: Callable[[Any], Awaitable[None]]) -> Queue:
        self.arrive = cb
        return self

    async def unsubscribe(self) -> None:
        return

    def require(self) -> None:
        return

    @contextmanager
    def failure_of(self, subject: str) -> Iterator[asyncio.Future[Exception]]:
        yield asyncio.get_running_loop().create_future()

    async def publish(self, subject: str, body: bytes, reply: str) -> None:
        assert self.arrive is not None
        for _ in range(min(json.loads(body)["batch"], self.stored - self.given)):
            self.given += 1
            await self.arrive(self.message(self.given))

    def message(self, number: int) -> Any:
        async def ack() -> None:
            self.acknowledged += 1

        async def in_progress() -> None:
            self.kept_alive += 1

        sequence = SimpleNamespace(stream=number, consumer=number)
        metadata = SimpleNamespace(stream="INGRESS", sequence=sequence, num_delivered=1, num_pending=0)
        return SimpleNamespace(
            reply=f"$JS.ACK.INGRESS.committer.1.{number}.{number}.1.0", subject=f"connito.v1.r.ingress.k{number}.reveal",
            data=b"", headers=None, metadata=metadata, ack=ack, nak=ack, in_progress=in_progress,
        )  # fmt: skip


async def bury(_: object) -> None:
    raise AssertionError("nothing is wrong with these")


def key(record: Record) -> str:
    return record.subject.split(".")[4]


@pytest.mark.parametrize("held_up", [False, True])
async def test_what_is_held_does_not_grow_with_the_queue(held_up: bool) -> None:
    """Unless it waits for something: then others are let past it."""
    queue, may = Queue(), asyncio.Event()

    async def handle(record: Record) -> None:
        if held_up and not may.is_set():
            raise Retry("away", after=60, dependency="store")
        await may.wait()

    worker = Worker(cast(Connection, queue), "committer", handle, bury, 0.01, concurrency=8, lane=key)
    running = asyncio.create_task(worker.run())
    most = STORED if held_up else 2 * AHEAD
    async with asyncio.timeout(10):
        while queue.kept_alive < 3 * min(most, AHEAD) or (held_up and len(worker.held) < STORED):
            await asyncio.sleep(0)
            assert len(worker.held) <= most
    may.set()
    worker.answered("store")
    async with asyncio.timeout(10):
        while queue.acknowledged < STORED:  # noqa: ASYNC110 - the worker's turn
            await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not worker.held
