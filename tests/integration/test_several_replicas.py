"""Several brokers in one list, and several replicas of a service that register one name."""

from __future__ import annotations

import asyncio
import re
import uuid

import pytest
from connito.bus import Bus
from connito.errors import Invalid, Retry
from connito.platform.servers import NatsServer, free_ports
from connito.service import rpc
from connito.wire.identity import Identity

from tests.support.waiting import until

from .conftest import BusFactory

pytestmark = pytest.mark.integration


async def test_an_unreachable_broker_of_a_list_is_passed_over(nats_server: NatsServer) -> None:
    nobody = [f"127.0.0.1:{port}" for port in free_ports(3)]
    # The client library tries them in an order of chance.
    for _ in range(6):
        async with await Bus.connect(",".join([*nobody, nats_server.url]), Identity.generate(), "test") as bus:
            assert bus.connected
    with pytest.raises(Retry, match=re.escape(nobody[1])):
        await Bus.connect(",".join(nobody), Identity.generate(), "test")


async def test_a_list_with_something_that_is_no_address_is_refused(nats_server: NatsServer) -> None:
    with pytest.raises(Invalid, match=r"'127\.0\.0\.1:4222:x' is not the address"):
        await Bus.connect(f"{nats_server.url},127.0.0.1:4222:x", None, "test")


async def test_a_replica_takes_over_the_name_of_one_that_is_lost(bus_factory: BusFactory) -> None:
    """The last to register is found, until nobody serves there; then the other one is, and stays."""
    name, bus = f"api-{uuid.uuid4().hex[:8]}", await bus_factory()
    found: list[str] = []
    find = bus.find_endpoint

    async def finding(name: str, timeout: float = 30.0) -> str:
        found.append(await find(name, timeout))
        return found[-1]

    bus.find_endpoint = finding  # type: ignore[method-assign]
    async with rpc.serve([], "127.0.0.1", 0, drain_s=0.1) as staying:
        ours = f"127.0.0.1:{staying}"
        async with rpc.serve([], "127.0.0.1", 0, drain_s=0.1) as lost:
            theirs = f"127.0.0.1:{lost}"
            for address in (ours, theirs):
                await rpc.register(bus, name, address)
            keeping = asyncio.create_task(rpc.stay_registered(bus, name, ours, every=0.05))
            await until(lambda: len(found) > 5)
            assert set(found) == {theirs}
        await until(lambda: found[-3:] == [ours] * 3)
        keeping.cancel()
