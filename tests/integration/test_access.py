"""Keys that come, go and are replaced while a run goes on: one real broker, reloaded, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from connito.bus import Bus
from connito.errors import ConnitoError, Invalid
from connito.platform.access import Access
from connito.platform.servers import NatsServer
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.passes import parse
from connito.wire.roster import Roster

from tests.support.desk import desk
from tests.support.waiting import PATIENCE, declared

# The client library leaves sockets of refused logins to the garbage collector.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]


async def cut_off(bus: Bus) -> None:
    """Until the broker has closed a connection."""
    closed = asyncio.Event()

    async def on_disconnected() -> None:
        closed.set()

    bus.connection.nc._disconnected_cb = on_disconnected
    if bus.connected:
        await asyncio.wait_for(closed.wait(), PATIENCE)


class Follower:
    """Reads RUNS for ever and counts how often its connection broke."""

    def __init__(self, bus: Bus) -> None:
        self.bus, self.broken = bus, 0
        self.seen: list[Record] = []
        self.moved = asyncio.Event()
        bus.connection.on_reconnect.append(self._break)
        self.task = asyncio.create_task(self._read())

    def _break(self) -> None:
        self.broken += 1

    async def _read(self) -> None:
        async with aclosing(self.bus.follow(("RUNS",))) as records:
            async for item in records:
                if isinstance(item, Record):
                    self.seen.append(item)
                    self.moved.set()

    async def count(self, wanted: int) -> None:
        async with asyncio.timeout(PATIENCE):
            while len(self.seen) < wanted:
                self.moved.clear()
                await self.moved.wait()


Connect = Callable[[Identity, str], Awaitable[Bus]]


@pytest.fixture
def access(tmp_path: Path) -> Access:
    found = Access(tmp_path / "secrets")
    found.export(validators=1)
    return found


@pytest.fixture
async def broker(tmp_path: Path, access: Access) -> AsyncIterator[NatsServer]:
    with NatsServer(tmp_path / "nats", accounts=access.accounts) as server:
        operator = Identity.load(access.folder / "keys" / "operator.nk")
        async with await Bus.connect(server.url, operator, "operator") as bus:
            await declared(bus.js)
        async with desk(server.url, key_of(access, "committer")):
            yield server


@pytest.fixture
async def connect(broker: NatsServer, access: Access) -> AsyncIterator[Connect]:
    opened: list[Bus] = []

    async def connect(identity: Identity, name: str) -> Bus:
        opened.append(await Bus.connect(broker.url, identity, name, access.roster()))
        return opened[-1]

    yield connect
    for bus in opened:
        await bus.close()


def key_of(access: Access, name: str) -> Identity:
    return Identity.load(access.folder / "keys" / f"{name}.nk")


async def verb(broker: NatsServer, *arguments: str) -> dict[str, Any]:
    """`connito access …`, and the broker is told at once."""
    told = [] if arguments[0] == "add" else ["--bus", broker.url]
    command = [sys.executable, "-m", "connito.cli", "access", *arguments, *told, "--json"]
    done = await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout))


async def write(bus: Bus, run: str) -> bool:
    return await bus.publish_fact(run, "run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run)))


async def test_a_miner_comes_and_goes_and_nobody_else_notices(
    broker: NatsServer, access: Access, connect: Connect
) -> None:
    folder = str(access.folder)
    staying, leaving = Identity.generate(), Identity.generate()
    with pytest.raises(ConnitoError):
        await Bus.connect(broker.url, leaving, "stranger")
    passes = (await verb(broker, "add", folder, staying.public, leaving.public))["passes"]
    staying, leaving = (one.with_passes(parse(passes[one.public], one.public)) for one in (staying, leaving))
    coordinator = await connect(key_of(access, "coordinator"), "coordinator")
    followers = [Follower(coordinator), Follower(await connect(staying, "staying"))]
    gone = Follower(await connect(leaving, "leaving"))
    await write(coordinator, "r1")
    for follower in (*followers, gone):
        await follower.count(1)

    assert (await verb(broker, "revoke", folder, leaving.public))["miners"] == 1
    await cut_off(gone.bus)
    await write(coordinator, "r2")
    for follower in followers:
        await follower.count(2)
        assert follower.broken == 0
    with pytest.raises(ConnitoError):
        await gone.bus.publish_ingress("r2", "trained", cycle_pb2.TrainingFinished(run="r2", cycle=1))
    with pytest.raises(ConnitoError):
        await Bus.connect(broker.url, leaving, "again")
    await followers[1].bus.publish_ingress("r2", "trained", cycle_pb2.TrainingFinished(run="r2", cycle=1))
    assert len(gone.seen) == 1, "nothing that was written after the revocation reached the revoked key"
    for follower in (*followers, gone):
        follower.task.cancel()


async def test_a_service_key_is_replaced_while_both_are_good(
    broker: NatsServer, access: Access, connect: Connect
) -> None:
    folder = str(access.folder)
    validator = Follower(await connect(key_of(access, "validator-1"), "validator"))
    first_key = key_of(access, "coordinator")
    first = await connect(first_key, "coordinator-a")
    await write(first, "r1")

    told = await verb(broker, "rotate", folder, "coordinator")
    second_key = key_of(access, "coordinator")
    assert (told["previous"], told["key"]) == (first_key.public, second_key.public)
    second = await connect(second_key, "coordinator-b")
    await write(first, "r2")
    await write(second, "r3")
    with pytest.raises(subprocess.CalledProcessError):
        await verb(broker, "rotate", folder, "coordinator")

    await verb(broker, "rotate", folder, "coordinator", "--finish")
    await cut_off(first)
    await write(second, "r4")
    await validator.count(4)
    assert validator.broken == 0
    log = Log(access.roster())
    for record in validator.seen:
        log.apply(record)
    assert set(log.runs) == {"r1", "r2", "r3", "r4"}, "what the old key has written stays valid"
    late = Record(validator.seen[0].stream, 99, validator.seen[0].subject, validator.seen[0].data, 1 << 60)
    with pytest.raises(Invalid, match="is not a coordinator"):
        Log(access.roster()).apply(late)
    validator.task.cancel()


def test_a_roster_file_keeps_retired_keys(tmp_path: Path) -> None:
    access = Access(tmp_path)
    access.export(validators=2)
    validator = access.member("validator-2")
    stakes = Roster(access.roster().keys, {validator.key: 4.0})
    stakes.save(tmp_path / "roster.json")
    access.rotate("validator-2")
    access.finish("validator-2", now_ms=1000)
    roster = Roster.load(tmp_path / "roster.json")
    assert roster.permitted("validator", validator.key, 1000)
    assert not roster.permitted("validator", validator.key, 1001)
    assert not roster.permitted("coordinator", validator.key, 1000)
    assert roster.stake(access.member("validator-2").key) == 4.0
