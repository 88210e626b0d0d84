"""The permissions at work: the real broker, a key a role, and what each of them gets to do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from connito.bus import Bus, CaughtUp, streams
from connito.bus.lease import Lease
from connito.errors import Invalid, Retry
from connito.platform.accounts import Accounts
from connito.platform.servers import NatsServer
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from tests.support.desk import desk
from tests.support.waiting import PATIENCE, declared

pytestmark = pytest.mark.integration

Connect = Callable[[str], Awaitable[Bus]]


@pytest.fixture
async def connect(tmp_path: Path, identities: dict[str, Identity], roster: Roster) -> AsyncIterator[Connect]:
    """`await connect(role)`: a connection to a broker that lets these keys in, each with its role's permissions."""
    accounts = Accounts(tmp_path / "accounts")
    accounts.make()
    everybody = {**identities, "operator": Identity.generate(), "other miner": Identity.generate()}
    people = {role: accounts.welcome(role.removeprefix("other "), who) for role, who in everybody.items()}
    opened: list[Bus] = []
    with NatsServer(tmp_path / "nats", accounts=accounts) as server:

        async def connect(role: str) -> Bus:
            opened.append(await Bus.connect(server.url, people[role], role, roster))
            return opened[-1]

        operator = await connect("operator")
        await declared(operator.js)
        async with desk(server.url, people["committer"]):
            yield connect
            for bus in opened:
                await bus.close()


async def read(bus: Bus, *names: str) -> int:
    """How many messages these streams hold, as a follower sees it."""
    count = 0
    async with asyncio.timeout(PATIENCE), aclosing(bus.follow(names)) as records:
        async for item in records:
            if isinstance(item, CaughtUp):
                break
            count += 1
    return count


async def test_every_role_does_its_work(connect: Connect, identities: dict[str, Identity], run_id: str) -> None:
    coordinator, committer, validator, miner = [
        await connect(role) for role in ("coordinator", "committer", "validator", "miner")
    ]
    async with Lease(coordinator, "coordinator"):
        await coordinator.register_endpoint("coordinator", "127.0.0.1:1")
        assert await miner.find_endpoint("coordinator", timeout=PATIENCE) == "127.0.0.1:1"
        created = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run_id))
        assert await coordinator.publish_fact(run_id, "run", 0, "created", created)
        assert not await coordinator.publish_fact(run_id, "run", 0, "created", created)
    key = identities["validator"].public
    assert await validator.publish_fact(
        run_id, "train", 1, "seed", cycle_pb2.SeedCommitted(run=run_id, cycle=1, validator=key), key
    )
    await miner.publish_ingress(run_id, "trained", cycle_pb2.TrainingFinished(run=run_id, cycle=1))
    handled = asyncio.Event()

    tries = itertools.count()

    async def handle(record: object) -> None:
        # What comes again is noted at the broker while it is handled.
        if not next(tries):
            raise Retry("not yet", after=0.01)
        handled.set()

    work = asyncio.create_task(committer.consume("committer", handle))
    await asyncio.wait_for(handled.wait(), PATIENCE)
    async with asyncio.timeout(PATIENCE):
        while await committer.ack_floor("committer") < 1:  # noqa: ASYNC110 - the broker's state, asked for
            await asyncio.sleep(0.02)
    work.cancel()
    assert await read(miner, "RUNS", "TRAIN", "COMMIT", "SUBMIT", "MERGE") == 2
    for role in ("selector", "aggregator", "library"):
        assert await read(await connect(role), *streams.FACT_STREAMS) == 2


@pytest.mark.parametrize("stream", ["ADVISORIES"])
async def test_a_miner_cannot_read_what_is_not_for_miners(connect: Connect, stream: str) -> None:
    miner = await connect("miner")
    with pytest.raises(Invalid, match=f"does not let .* use .*{stream}"):
        await read(miner, stream)


async def test_a_miner_cannot_write_facts_nor_speak_for_another(
    connect: Connect, identities: dict[str, Identity], run_id: str
) -> None:
    miner = await connect("miner")
    with pytest.raises(Invalid, match="does not let"):
        await miner.publish_fact(run_id, "run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run_id)))
    other = await connect("other miner")
    subject = f"connito.v1.{run_id}.ingress.{identities['miner'].public}.trained"
    with pytest.raises(Invalid, match="does not let"):
        await other._publish(subject, b"x", {}, "test")


async def test_a_miner_cannot_take_messages_from_a_work_queue(connect: Connect, run_id: str) -> None:
    """The selector's queue lies on a stream that miners read."""
    coordinator, miner = await connect("coordinator"), await connect("miner")
    await coordinator.publish_fact(run_id, "run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run_id)))
    with pytest.raises(Invalid, match=r"MSG\.NEXT\.RUNS\.selector"):
        await miner.connection.request("$JS.API.CONSUMER.MSG.NEXT.RUNS.selector", b'{"batch":1,"no_wait":true}')
    taken = asyncio.Event()

    async def handle(record: object) -> None:
        taken.set()

    work = asyncio.create_task((await connect("selector")).consume("selector", handle))
    await asyncio.wait_for(taken.wait(), PATIENCE)
    work.cancel()


async def test_a_stranger_is_not_let_in(connect: Connect) -> None:
    operator = await connect("operator")
    with pytest.raises((Invalid, Retry)):
        await Bus.connect(operator.connection.url, Identity.generate(), "stranger")
