"""The broker's clock, kept on a machine whose own clock is worth nothing."""

from __future__ import annotations

import asyncio

import pytest
from connito.bus import clock as clocks
from connito.bus.clock import BrokerClock
from connito.errors import Retry


class World:
    """A steady clock of this machine, a broker `ahead` of it, and answers that take `delay` seconds."""

    def __init__(self) -> None:
        self.steady, self.ahead, self.delay = 100.0, 1_700_000_000.0, 0.0
        self.away = 0

    async def ask(self) -> float:
        if self.away:
            self.away -= 1
            raise Retry("away", after=0.0)
        self.steady += self.delay
        told = self.steady + self.ahead
        self.steady += self.delay
        return told


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def clock(world: World) -> BrokerClock:
    return BrokerClock(world.ask, lambda: world.steady)


async def test_it_is_the_broker_s_and_goes_on(world: World, clock: BrokerClock) -> None:
    world.delay = 0.5
    await clock.read()
    assert clock.now_ms() == round((world.steady + world.ahead) * 1000)
    world.steady += 7.25
    assert clock.now_ms() == round((world.steady + world.ahead) * 1000)


async def test_a_broker_that_is_set_is_followed(world: World, clock: BrokerClock) -> None:
    await clock.read()
    world.ahead -= 1800
    await clock.read()
    assert clock.now_ms() == round((world.steady + world.ahead) * 1000)


async def test_an_outage_neither_ends_nor_moves_it(
    world: World, clock: BrokerClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clocks, "EVERY_SECONDS", 0.0)
    world.away = 3
    keeping = asyncio.create_task(clock.keep())
    await asyncio.wait_for(clock.known.wait(), 5)
    assert world.away == 0
    world.away, world.ahead = 3, world.ahead + 60
    while clock.now_ms() != round((world.steady + world.ahead) * 1000):
        assert not keeping.done()
        await asyncio.sleep(0)
    keeping.cancel()
