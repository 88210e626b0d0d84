"""Leader election against a real broker: one holder, a larger token for each, takeover after a death."""

from __future__ import annotations

import asyncio
import sys
import time

import pytest
from connito.bus.lease import Lease, LeaseKeeper
from connito.bus.streams import LEASE_TTL
from connito.platform.servers import NatsServer
from connito.runtime.tasks import end_tasks
from connito.wire.identity import Identity

from tests.integration.conftest import BusFactory
from tests.support.clocks import set_clock
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.integration

TTL = LEASE_TTL

HOLDER = """
import asyncio, sys
from connito.bus import Bus
from connito.wire.identity import Identity
from connito.bus.lease import Lease, LeaseKeeper
from connito.runtime.tasks import end_tasks
from connito.bus.streams import LEASE_TTL

async def main():
    async with await Bus.connect(sys.argv[1], Identity.generate(), "holder") as bus:
        async with Lease(bus, "leader") as lease:
            print(lease.revision, flush=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_one_at_a_time_and_tokens_grow(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    inside = 0
    tokens: list[int] = []

    async def lead() -> None:
        nonlocal inside
        bus = await bus_factory(identities["coordinator"], own_nats.url)
        async with Lease(bus, "leader", TTL) as lease:
            inside += 1
            assert inside == 1
            assert lease.held
            tokens.append(lease.revision)
            await asyncio.sleep(0.05)
            inside -= 1
        assert not lease.held

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(lead() for _ in range(4)))
    assert tokens == sorted(set(tokens))


async def test_kept_for_longer_than_its_ttl(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    rival = Lease(await bus_factory(identities["aggregator"], own_nats.url), "leader", TTL)
    async with Lease(bus, "leader", TTL) as lease:
        token = lease.revision
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2.5 * TTL):
                await rival.__aenter__()
        assert lease.held
        assert lease.revision == token


async def of_one_that_was_killed(server: NatsServer) -> int:
    """Return the token of a process that took the lease and was killed with it."""
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, server.url, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        token = int(await holder.stdout.readline())
    finally:
        holder.kill()
        await holder.wait()
    return token


async def test_taken_over_after_sigkill(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    token = await of_one_that_was_killed(own_nats)
    began = time.monotonic()
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    async with asyncio.timeout(5 * TTL), Lease(bus, "leader", TTL) as lease:
        assert lease.revision > token
        assert time.monotonic() - began < 3 * TTL


@pytest.mark.parametrize("step", [-1800, 1800])
async def test_taken_over_from_one_that_died_before_the_broker_s_clock_was_set(
    step: int, own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    """Set back, the broker would keep the entry of the dead for half an hour, and the platform without a leader."""
    token = await of_one_that_was_killed(own_nats)
    set_clock(own_nats.pid, step)
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    async with asyncio.timeout(10 * TTL), Lease(bus, "leader", TTL) as lease:
        assert lease.revision > token


async def test_a_holder_that_was_paused_finds_it_lost(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    async with Lease(bus, "leader", TTL) as lease:
        time.sleep(1.5 * TTL)  # the whole process stands still  # noqa: ASYNC251
        assert not lease.held
        rival_bus = await bus_factory(identities["aggregator"], own_nats.url)
        async with asyncio.timeout(PATIENCE), Lease(rival_bus, "leader", TTL) as rival:
            await asyncio.wait_for(lease.lost.wait(), PATIENCE)
            assert rival.held
            assert rival.revision > lease.revision


async def test_lost_while_the_broker_is_away(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    async with Lease(bus, "leader", TTL) as lease:
        own_nats.kill()
        began = time.monotonic()
        await asyncio.wait_for(lease.lost.wait(), PATIENCE)
        assert time.monotonic() - began < 1.5 * TTL
        assert not lease.held
        own_nats.start()
    again = Lease(bus, "leader", TTL)
    async with asyncio.timeout(PATIENCE), again:
        assert again.revision > lease.revision


async def test_waits_for_a_broker_that_comes_back(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    own_nats.kill()
    lease = Lease(bus, "leader", TTL)
    acquiring = asyncio.create_task(lease.__aenter__())
    await asyncio.wait([acquiring], timeout=0.5)
    assert not acquiring.done()
    own_nats.start()
    async with asyncio.timeout(PATIENCE):
        await acquiring
        await lease.__aexit__(None, None, None)


async def test_a_keeper_begins_anew_after_every_loss_and_gives_the_lease_back(
    own_nats: NatsServer, bus_factory: BusFactory, identities: dict[str, Identity]
) -> None:
    bus = await bus_factory(identities["coordinator"], own_nats.url)
    keeper, begun = LeaseKeeper(bus, "leader", TTL), asyncio.Semaphore(0)

    async def begin() -> None:
        assert keeper.leading
        begun.release()

    keeping = asyncio.create_task(keeper.keep(begin))
    async with asyncio.timeout(PATIENCE):
        await begun.acquire()
        own_nats.kill()
        await until(lambda: not keeper.leading)
        own_nats.start()
        await begun.acquire()
        assert keeper.leading
        await end_tasks([keeping])
    assert not keeper.leading
    rival = await bus_factory(identities["aggregator"], own_nats.url)
    async with asyncio.timeout(TTL / 2), Lease(rival, "leader", TTL) as lease:
        assert lease.held
