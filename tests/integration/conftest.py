"""Real servers for tests.

`nats_server`   a `NatsServer` of this test process with every stream declared; shared: use your own `run_id`
`own_nats`      another one for one test alone, to be killed, stalled or given users
`object_store`  an `ObjectStore` of this test process
`store`         an `ArtifactStore` with a bucket and a cache of its own
`bus_factory`   `await bus_factory(identity)` connects to `nats_server`; closed at the end of the test.
                `await bus_factory(identity, url)` connects elsewhere
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from connito.bus import Bus
from connito.platform.servers import NatsServer, ObjectStore
from connito.store import ArtifactStore
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.support.waiting import declared

BusFactory = Callable[..., Awaitable[Bus]]


async def declare_streams(url: str) -> None:
    async with await Bus.connect(url, None, "declare") as bus:
        await declared(bus.js)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with NatsServer(tmp_path_factory.mktemp("nats")) as server:
        asyncio.run(declare_streams(server.url))
        yield server


@pytest.fixture
def own_nats(tmp_path: Path) -> Iterator[NatsServer]:
    with NatsServer(tmp_path / "nats") as server:
        asyncio.run(declare_streams(server.url))
        yield server


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture
async def store(object_store: ObjectStore, tmp_path: Path) -> ArtifactStore:
    bucket = f"test-{secrets.token_hex(6)}"
    artifacts = ArtifactStore(
        object_store.url, object_store.access_key, object_store.secret_key, bucket, "us-east-1", tmp_path / "cache"
    )
    await artifacts.ensure_bucket()
    return artifacts


@pytest.fixture
async def bus_factory(nats_server: NatsServer, roster: Roster) -> AsyncIterator[BusFactory]:
    opened: list[Bus] = []

    async def connect(identity: Identity | None = None, url: str = "") -> Bus:
        bus = await Bus.connect(url or nats_server.url, identity or Identity.generate(), "test", roster)
        opened.append(bus)
        return bus

    yield connect
    for bus in opened:
        await bus.close()
