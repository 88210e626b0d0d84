"""Whoever takes over from far behind gives back what was drawn in portions, and others go on meanwhile."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

from connito.bus import Bus
from connito.bus.handover import AT_ONCE, take_over


class Broker:
    """The connection: what is published lies here until it is flushed."""

    def __init__(self, floor: int, delivered: int) -> None:
        self.info = SimpleNamespace(
            num_waiting=0,
            num_ack_pending=1,
            ack_floor=SimpleNamespace(stream_seq=floor),
            delivered=SimpleNamespace(stream_seq=delivered, consumer_seq=delivered),
        )
        self.unsent, self.most, self.sequences = 0, 0, list[int]()
        self.nc = self.connection = self.js = self

    async def consumer_info(self, stream: str, durable: str) -> Any:
        return self.info

    async def manage(self, call: Any, what: str) -> Any:
        return await call

    async def publish(self, place: str, body: bytes) -> None:
        assert body == b"-NAK"
        self.sequences.append(int(place.split(".")[5]))
        self.unsent += 1
        self.most = max(self.most, self.unsent)

    async def flush(self, timeout: float) -> None:
        self.unsent = 0


async def test_what_was_drawn_is_given_back_in_portions() -> None:
    broker, turns = Broker(5, 5 + 20 * AT_ONCE + 7), 0

    async def live() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    other = asyncio.create_task(live())
    assert await take_over(cast(Bus, broker), "committer")
    assert broker.sequences == list(range(6, 13 + 20 * AT_ONCE))
    assert (broker.most, broker.unsent) == (AT_ONCE, 0)
    assert turns >= 19, "others had their turn"
    other.cancel()
    with suppress(asyncio.CancelledError):
        await other
