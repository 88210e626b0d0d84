"""Strangers at the broker: hostile programs with a good key, against the configuration that an operator's folder writes.

What they may do at all is said in `connito.bus.permissions`; here a real `nats-server` is asked everything else. A client may
name any subject for a reply, which is how a key that may ask the broker anything writes where only the broker may.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gc
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
from connito.bus import Bus, CaughtUp, streams
from connito.bus.desk import Desk
from connito.bus.follow import follow
from connito.bus.guard import ANSWERS_SECONDS, SHARE, Guard
from connito.bus.lease import Lease
from connito.bus.offences import collect
from connito.bus.permissions import ACCOUNTS, ANSWERED, ASKED, PLATFORM, accounts_of
from connito.errors import ConnitoError, Retry
from connito.platform.access import Access
from connito.platform.servers import NatsServer
from connito.runtime.tasks import end_tasks
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.passes import Authority, claims_of
from connito.wire.subjects import fact, ingress
from connito.wire.tls import PLAIN
from nats.aio.client import Client

from tests.support.desk import desk
from tests.support.waiting import PATIENCE, declared, until

# The client library leaves sockets of refused logins to the garbage collector.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")]

RUN = "r"
ROLES = ("miner", "validator", "customer")
READING = {accounts_of(role)[-1] for role in ROLES}
INFO_OF = "$JS.API.STREAM.INFO.RUNS"


@dataclass
class Hostile:
    """A key with its passes and no scruples: a bare connection to each of its accounts."""

    identity: Identity
    role: str
    clients: dict[str, Client] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    heard: list[str] = field(default_factory=list)

    async def _error(self, error: Exception) -> None:
        self.errors.append(str(error))

    async def hear(self, msg: Any) -> None:
        self.heard.append(msg.subject)

    def may(self, account: str) -> list[str]:
        """Every subject that its account lets it publish to, as one that it is."""
        said = (subject.replace("{{subject()}}", self.identity.public) for subject in ACCOUNTS[account].grants.publish)
        return [subject.replace("*", RUN, 1).replace("*", "1") for subject in said]

    async def settle(self) -> None:
        """Until the server has dealt with all that was sent."""
        for client in self.clients.values():
            if client.is_connected:
                with suppress(Exception):
                    await client.flush(timeout=5)


def inbox(key: Identity, token: str) -> str:
    """Where answers may come to, in the account of a pass."""
    return f"{ANSWERED if claims_of(token)['name'] in READING else '_INBOX'}.{key.public}"


async def log_in(url: str, key: Identity, token: str, error: Any = None, **options: Any) -> Client:
    async def silent(_: Exception) -> None: ...

    def sign(nonce: str) -> bytes:
        return base64.b64encode(key.sign_nonce(nonce.encode()))

    client = Client()
    await client.connect(
        url, user_jwt_cb=token.encode, signature_cb=sign, error_cb=error or silent, allow_reconnect=False,
        connect_timeout=5, inbox_prefix=inbox(key, token), **options,
    )  # fmt: skip
    return client


class Boundary:
    """A broker as `connito access export` configures it, an operator, a coordinator, and any number of strangers."""

    def __init__(self, access: Access, server: NatsServer) -> None:
        self.access, self.server = access, server
        self.opened: list[Bus | Client] = []
        self.operator: Bus
        self.desk: Desk

    def key(self, name: str) -> Identity:
        return Identity.load(self.access.folder / "keys" / f"{name}.nk")

    def newcomer(self, role: str = "miner") -> Identity:
        return self.access.accounts.welcome(role, Identity.generate())

    async def bus(self, identity: Identity) -> Bus:
        bus = await Bus.connect(self.server.url, identity, "test", self.access.roster())
        self.opened.append(bus)
        return bus

    async def hostile(self, role: str = "miner") -> Hostile:
        attacker = Hostile(self.newcomer(role), role)
        for account, token in zip(accounts_of(role), attacker.identity.passes, strict=True):
            client = await log_in(self.server.url, attacker.identity, token, attacker._error)
            attacker.clients[account] = client
            self.opened.append(client)
        return attacker

    async def state(self) -> dict[str, tuple[int, int, int]]:
        """Every stream and bucket: last sequence, messages, consumers."""
        found = {}
        for info in await self.operator.js.streams_info():
            name = info.config.name or ""
            found[name] = (info.state.last_seq, info.state.messages, info.state.consumer_count)
        return found


@pytest.fixture
async def boundary(tmp_path: Path) -> AsyncIterator[Boundary]:
    access = Access(tmp_path / "secrets")
    access.export(validators=2)
    with NatsServer(tmp_path / "nats", accounts=access.accounts) as server:
        found = Boundary(access, server)
        found.operator = await found.bus(found.key("operator"))
        await declared(found.operator.js)
        async with desk(server.url, found.key("committer")) as found.desk:
            yield found
        for one in found.opened:
            with suppress(Exception):
                await asyncio.wait_for(one.close(), 5)
        found.opened.clear()
        await asyncio.sleep(0)
        gc.collect()  # Here, where the mark above says what to make of it.


async def settled(boundary: Boundary, attacker: Hostile) -> dict[str, tuple[int, int, int]]:
    """The state once everything that the attacker sent has arrived or been dropped: the server works its queue off in order."""
    await attacker.settle()
    state = await boundary.state()
    while True:
        await asyncio.sleep(0.1)
        if (later := await boundary.state()) == state:
            return later
        state = later


def targets(boundary: Boundary, victim: Identity) -> list[str]:
    """Subjects that mean something to somebody else."""
    validator = boundary.key("validator-1").public
    return [
        fact(RUN, "merge", 1, "scored"),
        fact(RUN, "merge", 1, "version"),
        fact(RUN, "commit", 1, "opened"),
        fact(RUN, "validate", 1, "report", validator),
        ingress(RUN, victim.public, "commitment"),
        ingress(RUN, victim.public, "reveal"),
        f"$KV.{streams.LEASES}.coordinator",
        f"$KV.{streams.ENDPOINTS}.committer",
        f"connito.security.v1.denied.{validator}",
        "connito.dlq.v1.INGRESS.1",
        "$JS.API.STREAM.DELETE.RUNS",
        "$JS.API.STREAM.PURGE.DLQ",
        "$JS.API.STREAM.CREATE.MINE",
        "$JS.API.CONSUMER.DELETE.INGRESS.committer",
        "$JS.API.CONSUMER.MSG.NEXT.INGRESS.committer",
        "$JS.API.CONSUMER.DURABLE.CREATE.RUNS.mine",
        "$JS.ACK.INGRESS.committer.1.1.1.1.1",
        "$JS.API.INFO",
        "$SYS.REQ.SERVER.PING",
        f"$SYS.REQ.ACCOUNT.{boundary.access.accounts.platform}.CLAIMS.DELETE",
        "$SYS.REQ.CLAIMS.UPDATE",
        "$SYS.REQ.CLAIMS.DELETE",
        "_R_.x.y",
        "live.RUNS.connito.v1.r.run.0.ended",
        f"_INBOX.{victim.public}.x",
    ]


@pytest.mark.parametrize("role", ROLES)
async def test_no_reply_subject_of_a_stranger_reaches_anything(boundary: Boundary, role: str) -> None:
    """Everything a stranger may ask or say, with everything that matters to others as the subject of the reply."""
    coordinator, victim = await boundary.bus(boundary.key("coordinator")), boundary.newcomer()
    created = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=RUN))
    await coordinator.publish_fact(RUN, "run", 0, "created", created)
    await coordinator.register_endpoint("coordinator", "127.0.0.1:1")
    attacker = await boundary.hostile(role)
    before, asked = await settled(boundary, attacker), 0
    for account, client in attacker.clients.items():
        for subject in attacker.may(account):
            for target in targets(boundary, victim):
                for body in (b"", b"{}", b'{"seq":1}', b'{"seq":1,"batch":50}', b'{"last_by_subj":"connito.v1.>"}'):
                    await client.publish(subject, body, reply=target)
                    asked += 1
    after = await settled(boundary, attacker)
    assert asked > 300
    own = (
        {"INGRESS"}
        if role == "miner"
        else {"ADVISORIES", "TRAIN", "VALIDATE", "RUNS"}
        if role == "validator"
        else set()
    )
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= own, {name: (before[name], after[name]) for name in changed}
    for name in changed:  # What it may say under its own key, and nothing else.
        _, _, had = before[name]
        assert after[name][2] == had
        start = before[name][0] + 1
        async with aclosing(boundary.operator.follow([name], start={name: start})) as records:
            async for record in records:
                if isinstance(record, CaughtUp):
                    break
                assert attacker.identity.public in record.subject
    assert set(after) == set(before)
    assert await coordinator.find_endpoint("coordinator") == "127.0.0.1:1"
    # Some replies the server refuses by itself; the rest went nowhere.
    assert all("publish with reply of" in error for error in attacker.errors), attacker.errors[:3]


@pytest.mark.parametrize("role", ROLES)
async def test_nothing_else_can_be_said_or_asked(boundary: Boundary, role: str) -> None:
    victim, other = boundary.newcomer(), boundary.key("validator-1").public
    attacker = await boundary.hostile(role)
    before = await settled(boundary, attacker)
    mine = attacker.identity.public
    tries = [
        *targets(boundary, victim),
        INFO_OF,
        "$JS.API.DIRECT.GET.RUNS",
        f"{ASKED}.RUNS.{victim.public}",
        f"{ASKED}.ADVISORIES.{mine}",
        f"{ANSWERED}.{victim.public}.x",
        "$JS.API.STREAM.LIST",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.UPDATE.RUNS",
        "$JS.API.STREAM.MSG.GET.RUNS",
        "$JS.API.STREAM.MSG.DELETE.RUNS",
        "$JS.API.STREAM.SNAPSHOT.RUNS",
        "$JS.API.STREAM.RESTORE.RUNS",
        "$JS.API.STREAM.LEADER.STEPDOWN.RUNS",
        "$JS.API.META.LEADER.STEPDOWN",
        "$JS.API.CONSUMER.CREATE.RUNS",
        "$JS.API.CONSUMER.CREATE.RUNS.mine",
        "$JS.API.CONSUMER.CREATE.RUNS.mine.connito.v1.>",
        "$JS.API.CONSUMER.LIST.RUNS",
        "$JS.API.CONSUMER.PAUSE.INGRESS.committer",
        "$JS.hub.API.STREAM.INFO.RUNS",
        "$JS.FC.RUNS.x.y",
        f"$JS.API.DIRECT.GET.KV_{streams.LEASES}",
        f"$JS.API.DIRECT.GET.KV_{streams.LEASES}.$KV.{streams.LEASES}.coordinator",
        f"$JS.API.DIRECT.GET.KV_{streams.ENDPOINTS}",
        "$JS.API.DIRECT.GET.ADVISORIES",
        "$JS.API.DIRECT.GET.RUNS.connito.v1.r.run.0.created",
        "$SYS.REQ.USER.INFO",
        "$SYS.REQ.SERVER.PING.CONNZ",
        f"$SYS.ACCOUNT.{mine}.CONNECT",
        f"$G.{fact(RUN, 'merge', 1, 'scored')}",
        ingress(RUN, mine, "commitment") + ".more",
        ingress(RUN, mine, "fact"),
        f"connito.v1.{RUN}.ingress.{mine}x.commitment",
        f"connito.v1.{RUN}.run.0.validator.{other}",
    ]
    if role != "miner":
        tries.append(ingress(RUN, mine, "commitment"))
    for client in attacker.clients.values():
        for subject in tries:
            await client.publish(subject, b"{}", reply=f"_INBOX.{mine}.x")
    await attacker.settle()

    def denied() -> int:
        return sum("permissions violation for publish" in error.lower() for error in attacker.errors)

    async with asyncio.timeout(PATIENCE):
        while denied() < len(tries) * len(attacker.clients):  # noqa: ASYNC110 - the library tells nobody
            await asyncio.sleep(0.01)
    assert await settled(boundary, attacker) == before


@pytest.mark.parametrize("role", ROLES)
async def test_nobody_listens_to_others(boundary: Boundary, role: str) -> None:
    honest, attacker = await boundary.bus(boundary.newcomer()), await boundary.hostile(role)
    validator = await boundary.bus(boundary.key("validator-1"))
    tries = [
        ">", "*", "*.>", "_INBOX.>", f"_INBOX.{honest.identity.public}.>", "_INBOX.*.*", "_R_.>", f"{ASKED}.>",
        f"{ANSWERED}.>", f"{ANSWERED}.{honest.identity.public}.>", "$SYS.>", "$JS.>",
        "$JS.EVENT.ADVISORY.>", "$KV.>", "connito.>", "connito.v1.*.ingress.>", "live.>", "live.*.connito.v1.>",
        "live.ADVISORIES.>", "connito.v1.*.validate.>", "$JS.API.>", "$JS.ACK.>",
    ]  # fmt: skip
    for client in attacker.clients.values():
        for subject in tries:
            await client.subscribe(subject, cb=attacker.hear)
            await client.subscribe(subject, queue="q", cb=attacker.hear)
    await attacker.settle()
    key = validator.identity.public
    await validator.publish_fact(RUN, "train", 1, "seed", cycle_pb2.SeedCommitted(run=RUN, cycle=1, validator=key), key)
    await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    async with Lease(await boundary.bus(boundary.key("coordinator")), "coordinator"):
        assert [item async for item in honest.stored(["RUNS", "TRAIN"])]
    await attacker.settle()
    assert attacker.heard == []


async def test_a_leader_leads_through_a_flood_of_injections(boundary: Boundary) -> None:
    coordinator, attacker = await boundary.bus(boundary.key("coordinator")), await boundary.hostile()
    async with Lease(coordinator, "coordinator", ttl=1.5) as lease:
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            for account, client in attacker.clients.items():
                for subject in attacker.may(account):
                    await client.publish(subject, b'{"seq":1}', reply=f"$KV.{streams.LEASES}.coordinator")
                await client.flush()
            await asyncio.sleep(0.02)
        assert lease.held


async def test_forged_hints_are_never_evidence(boundary: Boundary) -> None:
    coordinator, honest = await boundary.bus(boundary.key("coordinator")), await boundary.bus(boundary.newcomer())
    attacker = await boundary.hostile()
    await coordinator.publish_fact("a", "run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run="a")))
    await coordinator.publish_fact("a", "train", 1, "opened", cycle_pb2.WindowOpened(run="a", cycle=1))
    seen: list[Record] = []
    async with aclosing(honest.follow(["RUNS"])) as records:
        async for item in records:
            if isinstance(item, Record):
                seen.append(item)
            elif isinstance(item, CaughtUp):
                for _ in range(200):
                    await attacker.clients["miners-read"].publish(
                        "$JS.API.DIRECT.GET.KV_ENDPOINTS.$KV.ENDPOINTS.x",
                        b"",
                        reply="live.RUNS.connito.v1.a.run.0.ended",
                    )
                await attacker.settle()
                spec = run_pb2.RunSpec(run="b")
                began = time.monotonic()
                await coordinator.publish_fact("b", "run", 0, "created", run_pb2.RunCreated(spec=spec))
            if len(seen) == 2:
                break
    assert time.monotonic() - began < 1.0
    assert [record.subject.split(".")[2] for record in seen] == ["a", "b"]


HEADERS: Sequence[Mapping[str, str]] = (
    {"Nats-Rollup": "all"},
    {"Nats-Rollup": "sub"},
    {"Nats-TTL": "1s"},
    {"Nats-Schedule": "@at 2009-11-10T23:00:00Z", "Nats-Schedule-Target": "connito.v1.r.merge.1.scored"},
    {"Nats-Marker-Reason": "Purge"},
    {"KV-Operation": "PURGE"},
    {"Nats-Expected-Stream": "RUNS"},
    {"Nats-Expected-Last-Sequence": "0"},
    {"Nats-Stream": "RUNS", "Nats-Subject": "connito.v1.r.merge.1.scored", "Nats-Sequence": "99"},
    {"Nats-Time-Stamp": "2009-11-10T23:00:00Z", "Nats-Num-Pending": "0", "Nats-Last-Sequence": "7"},
    {"Status": "404", "Description": "Message Not Found"},
    {"Status": "204"},
    {"Nats-Batch-Id": "x", "Nats-Batch-Sequence": "1", "Nats-Batch-Commit": "1"},
    {"Nats-Incr": "+1"},
    {"Nats-Service-Error": "x", "Nats-Service-Error-Code": "500"},
)


async def test_headers_of_a_message_change_nothing_but_the_message(boundary: Boundary) -> None:
    attacker, honest = await boundary.hostile(), await boundary.bus(boundary.newcomer())
    said = ingress(RUN, attacker.identity.public, "trained")
    await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    for number, headers in enumerate(HEADERS):
        await attacker.clients["miners-say"].publish(said, b"%d" % number, headers=dict(headers))
    await settled(boundary, attacker)
    await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=2))
    async with asyncio.timeout(PATIENCE):
        read = [record async for record in boundary.operator.stored(["INGRESS"])]
    assert [record.sequence for record in read] == list(range(1, len(read) + 1))
    mine = ingress(RUN, honest.identity.public, "trained")
    assert [record.subject for record in read] == [mine, *[said] * (len(read) - 2), mine]
    assert all(abs(record.time_unix_ms / 1000 - time.time()) < 60 for record in read)
    info = await boundary.operator.js.stream_info("MERGE")
    assert info.state.messages == 0


RAW_HEADERS = (
    b"NATS/1.0\r\n\r\nx: y\r\n\r\n",
    b"NATS/1.0\r\nno colon here\r\n\r\n",
    b"NATS/1.0\r\nA: b\n\nNats-Subject: z\n\r\n\r\n",
    b"NATS/1.0 404 Message Not Found\r\n\r\n",
    b"NATS/1.0 204 EOB\r\nNats-Num-Pending: 0\r\n\r\n",
    b"NATS/1.0\r\n\xff\xfe: \xff\r\n\r\n",
    b"NATS/1.0\r\n: empty\r\n : space\r\n\r\n",
    b"NATS/1.0\r\nNats-Sequence: x\r\nNats-Sequence: -1\r\n\r\n",
    b"garbage",
    b"NATS/1.0\r\nA: bcdef",
    b"\x00" * 40,
)


async def test_header_blocks_that_are_none_stop_no_reader(boundary: Boundary) -> None:
    """What no client library would send: bytes on the socket."""
    attacker = await boundary.hostile()
    client, honest = attacker.clients["miners-say"], await boundary.bus(boundary.newcomer())
    said = ingress(RUN, attacker.identity.public, "trained").encode()
    for block in RAW_HEADERS:
        body = b"b"
        total = len(block) + len(body)
        with suppress(Exception):
            await client._send_command(b"HPUB %s %d %d\r\n%s%s\r\n" % (said, len(block), total, block, body))
            await client.flush(timeout=2)
        if not client.is_connected:  # The server hung up on it; the next one.
            token = attacker.identity.passes[0]
            client = await log_in(boundary.server.url, attacker.identity, token, attacker._error)
            boundary.opened.append(client)
    await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    stored = (await boundary.operator.js.stream_info("INGRESS")).state.last_seq
    async with asyncio.timeout(PATIENCE):
        read = [record async for record in boundary.operator.stored(["INGRESS"])]
    assert [record.sequence for record in read] == list(range(1, stored + 1))
    assert read[-1].subject == ingress(RUN, honest.identity.public, "trained")


# Tokens of a subject that are no text, or that a client library takes for two words.
RAW_TOKENS = (b"\xff\xfe", b"x\x0by", b"x\x0c7\x0b8")
SHORT_BLOCKS = (b"x", b"NATS/1.0 \xff\xff\xff\r\n\r\n")


async def test_bytes_that_are_no_text_end_nobodys_reading(boundary: Boundary) -> None:
    """What a client library cannot take apart ended its reading: that of all who follow for twelve seconds, and the committer's
    again each time its queue handed the message out."""
    honest, attacker = await boundary.bus(boundary.newcomer()), await boundary.hostile()
    committer = await boundary.bus(boundary.key("committer"))
    handled: asyncio.Queue[Record] = asyncio.Queue()
    work = asyncio.create_task(committer.consume("committer", handled.put))
    key, follower = attacker.identity.public.encode(), honest.follow(["INGRESS"], of_all=True)
    async with aclosing(follower) as items:
        assert isinstance(await anext(items), CaughtUp)
        reading = [committer.connection.nc, honest._reading.nc, boundary.desk._connection.nc]
        for token in RAW_TOKENS:
            asked = b'PUB %s.RUNS.%s %s.%s.%s 9\r\n{"seq":1}\r\n'
            await attacker.clients["miners-read"]._send_command(
                asked % (ASKED.encode(), key, ANSWERED.encode(), key, token)
            )
            said = b"PUB connito.v1.%s.ingress.%s.trained 1\r\nx\r\n"
            await attacker.clients["miners-say"]._send_command(said % (token, key))
        for block in SHORT_BLOCKS:
            size = len(block)
            asked = b'HPUB %s.RUNS.%s %s.%s.a %d %d\r\n%s{"seq":1}\r\n'
            await attacker.clients["miners-read"]._send_command(
                asked % (ASKED.encode(), key, ANSWERED.encode(), key, size, size + 9, block)
            )
            said = b"HPUB connito.v1.r.ingress.%s.trained %d %d\r\n%sx\r\n"
            await attacker.clients["miners-say"]._send_command(said % (key, size, size + 1, block))
        await settled(boundary, attacker)
        await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
        mine = ingress(RUN, honest.identity.public, "trained")
        async with asyncio.timeout(PATIENCE):
            followed = [await anext(items)]
            while followed[-1].subject != mine:  # type: ignore[union-attr]
                followed.append(await anext(items))
            worked = [await handled.get() for _ in followed]
    assert len(followed) > len(RAW_TOKENS), "the broker stores what is no text"
    assert {record.sequence for record in worked} == {record.sequence for record in followed}  # type: ignore[union-attr]
    assert [nc.stats["reconnects"] for nc in reading] == [0, 0, 0]
    assert not any(nc._reading_task is None or nc._reading_task.done() for nc in reading)
    await end_tasks([work])


async def test_a_stranger_is_told_who_does_not_take_its_questions(
    boundary: Boundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = await boundary.bus(boundary.newcomer())
    monkeypatch.setattr("connito.bus.desk.AGAIN_SECONDS", 3600.0)
    await boundary.desk._connection.nc.close()
    with pytest.raises(Retry, match="in time; the committer hands on what strangers ask"):
        await honest.look("RUNS", seq=1)
    with pytest.raises(Retry, match="in time; the committer hands on what strangers ask"):
        async with asyncio.timeout(PATIENCE):
            [item async for item in follow(honest._reading, ["RUNS"], "", {}, patience=0.0)]


@pytest.mark.parametrize(
    ("role", "place", "size"), [("miner", 0, 21 << 10), ("miner", -1, 5 << 10), ("customer", 0, 5 << 10)]
)
async def test_too_large_a_message_costs_the_sender_its_connection(
    boundary: Boundary, role: str, place: int, size: int
) -> None:
    honest, attacker = await boundary.bus(boundary.newcomer()), await boundary.hostile(role)
    account = accounts_of(role)[place]
    before = await boundary.state()
    client, subject = attacker.clients[account], attacker.may(account)[0]
    await client._send_command(b"PUB %s %d\r\n%s\r\n" % (subject.encode(), size, b"x" * size))
    async with asyncio.timeout(PATIENCE):
        while client.is_connected:  # noqa: ASYNC110 - the library tells nobody
            await asyncio.sleep(0.01)
    assert await boundary.state() == before
    assert honest.connected


async def test_subscriptions_are_limited_for_each_connection(boundary: Boundary) -> None:
    honest, attacker = await boundary.bus(boundary.newcomer()), await boundary.hostile()
    for account, client in attacker.clients.items():
        for number in range(ACCOUNTS[account].subscriptions + 20):
            token = next(one for one in attacker.identity.passes if claims_of(one)["name"] == account)
            await client.subscribe(f"{inbox(attacker.identity, token)}.{number}", cb=attacker.hear)
    await attacker.settle()
    # What the server says last may come before the end of the connection.
    clients = attacker.clients.values()
    await until(lambda: not any(client.is_connected for client in clients), "the end of who asks for more")
    await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))


async def test_passes_open_nothing_that_they_were_not_signed_for(boundary: Boundary) -> None:
    access, url = boundary.access, boundary.server.url
    folder = access.folder / "accounts"
    state = json.loads((access.folder / "accounts.json").read_text())["accounts"]
    miner, victim, stranger = boundary.newcomer(), boundary.newcomer(), Identity.generate()
    signer = Authority.load(folder / "miners-say.nk")
    everything = {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}, "subs": -1, "data": -1, "payload": -1}
    now = int(time.time())

    def signed(by: Authority, account: str, body: Mapping[str, Any], key: Identity = miner, at: int = now) -> str:
        return by.sign(key.public, "miners-say", "user", {"issuer_account": state[account], **body}, at)

    head, claims, signature = miner.passes[0].split(".")
    raw = json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))
    raw["nats"]["bearer_token"] = True
    bearer = base64.urlsafe_b64encode(json.dumps(raw).encode()).decode().rstrip("=")
    none = base64.urlsafe_b64encode(b'{"typ":"JWT","alg":"none"}').decode().rstrip("=")
    tries: dict[str, tuple[Identity, str]] = {
        "nothing": (miner, ""),
        "another's pass": (miner, victim.passes[0]),
        "a pass without its key": (stranger, miner.passes[0]),
        "changed claims": (miner, f"{head}.{bearer}.{signature}"),
        "no signature": (miner, f"{none}.{bearer}."),
        "the seed of miners for the platform": (miner, signed(signer, PLATFORM, {})),
        "the seed of miners for the system": (miner, signed(signer, "system", everything)),
        "the seed of miners for readers": (miner, signed(signer, "miners-read", {})),
        "rights beside the template": (miner, signed(signer, "miners-say", everything)),
        "an authority of one's own": (miner, signed(Authority.generate(0), "miners-say", {})),
    }
    for what, (key, token) in tries.items():
        with suppress(Exception):
            boundary.opened.append(await log_in(url, key, token))
            pytest.fail(f"let in: {what}")
    for key in (stranger, miner.with_passes(())):
        with pytest.raises(ConnitoError):
            await Bus.connect(url, key, "by key alone")
    bare = Client()
    with suppress(Exception):
        await bare.connect(url, allow_reconnect=False, connect_timeout=2)
    assert not bare.is_connected


async def test_a_banned_key_is_out_at_once_and_nobody_else(boundary: Boundary, tmp_path: Path) -> None:
    access = boundary.access
    access.add([(leaving := Identity.generate()).public, (staying := Identity.generate()).public])
    leaving, staying = (boundary.access.accounts.welcome("miner", one) for one in (leaving, staying))
    gone, stays = await boundary.bus(leaving), await boundary.bus(staying)
    coordinator, validator = [await boundary.bus(boundary.key(name)) for name in ("coordinator", "validator-1")]
    old_config = json.loads((access.folder / "nats.conf").read_text())["resolver_preload"]
    began = time.monotonic()
    access.revoke([leaving.public])
    await access.accounts.push(boundary.server.url)
    while gone.connection.connected or gone._reading.connected:
        assert time.monotonic() - began < 2.0
        await asyncio.sleep(0.005)
    with pytest.raises(ConnitoError):
        await Bus.connect(boundary.server.url, leaving, "again")
    assert stays.connected
    assert coordinator.connected
    assert validator.connected
    await stays.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    await coordinator.publish_fact(RUN, "run", 0, "created", run_pb2.RunCreated(spec=run_pb2.RunSpec(run=RUN)))
    assert len([record async for record in stays.stored(["RUNS"])]) == 1
    # A server that starts with yesterday's file still knows.
    boundary.server.stop()
    written = boundary.server._config
    boundary.server._config = lambda: written() | {"resolver_preload": old_config}  # type: ignore[method-assign]
    await asyncio.to_thread(boundary.server.start)
    with pytest.raises(ConnitoError):
        await Bus.connect(boundary.server.url, leaving, "after a restart")
    # And back.
    access.add([leaving.public])
    await access.accounts.push(boundary.server.url)
    again = await boundary.bus(access.accounts.welcome("miner", leaving))
    await again.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=2))


@pytest.mark.slow
async def test_ten_thousand_are_admitted_without_the_server_hearing_of_it(boundary: Boundary) -> None:
    access = boundary.access
    before = (access.folder / "nats.conf").stat().st_size
    keys = [Identity.generate(n.to_bytes(32, "big")) for n in range(1, 10_001)]
    began = time.monotonic()
    passes = access.add([key.public for key in keys])
    each = (time.monotonic() - began) / len(keys)
    assert (access.folder / "nats.conf").stat().st_size == before
    assert len(passes) == len(access.miners) == 10_000
    began = time.monotonic()
    late = Identity.generate()
    late = late.with_passes(tuple(access.add([late.public])[late.public].split("~")))
    bus = await boundary.bus(late)
    await bus.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    assert time.monotonic() - began < 5.0
    print(f"{1000 * each:.2f} ms each; the last one in after {time.monotonic() - began:.2f} s")
    for key in keys[:: len(keys) // 20]:
        member = key.with_passes(tuple(passes[key.public].split("~")))
        await (await Bus.connect(boundary.server.url, member, "one of many")).close()


async def test_what_was_asked_while_the_committer_stood_still_is_held_against_nobody(
    boundary: Boundary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many questions as a key may ask come all at once when a machine that was suspended goes on."""
    reported = list[str]()
    monkeypatch.setattr("connito.bus.desk.report", lambda kind, **_: reported.append(kind))
    honest, body = boundary.newcomer(), b'{"seq":1}'
    line = f"PUB {ASKED}.RUNS.{honest.public} {ANSWERED}.{honest.public}.a {len(body)}\r\n".encode() + body + b"\r\n"
    orders = {"seed": honest.seed, "token": honest.passes[-1], "port": boundary.server.port, "lines": 1, "rate": 90,
              "seconds": 9, "data": [base64.b64encode(line).decode()]}  # fmt: skip
    asking = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.flooding", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert asking.stdin is not None
    asking.stdin.write(json.dumps(orders).encode())
    asking.stdin.close()
    await until(lambda: honest.public in boundary.desk._rate._buckets, "the first question")
    time.sleep(7)  # noqa: ASYNC251 - the desk's loop stands still, and nothing else has to go on in it
    out, _ = await asking.communicate()
    assert json.loads(out)["sent"] > 500
    assert reported == []


async def test_who_asks_without_end_delays_nobody_for_long(boundary: Boundary) -> None:
    coordinator, honest = await boundary.bus(boundary.key("coordinator")), await boundary.bus(boundary.newcomer())
    for cycle in range(1, 301):
        opened = cycle_pb2.WindowOpened(run=RUN, cycle=cycle, window=cycle_pb2.WINDOW_TRAIN)
        await coordinator.publish_fact(RUN, "train", cycle, "opened", opened)
    attackers = [await boundary.hostile() for _ in range(3)]

    async def ask(attacker: Hostile) -> None:
        body = b'{"seq":1,"batch":1000,"max_bytes":100000000}'
        with suppress(Exception):
            while True:
                key = attacker.identity.public
                await attacker.clients["miners-read"].publish(f"{ASKED}.TRAIN.{key}", body, reply=f"{ANSWERED}.{key}.x")
                await attacker.clients["miners-read"].flush()

    asking = [asyncio.create_task(ask(attacker)) for attacker in attackers]
    slowest = 0.0
    for cycle in range(1, 21):
        began = time.monotonic()
        await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=cycle))
        slowest = max(slowest, time.monotonic() - began)
    for task in asking:
        task.cancel()
    # 2 to 9 s before there was a desk. How soon it is on a quiet machine is what `bench.floods` says.
    assert slowest < 2.0


async def test_a_question_names_no_more_subjects_than_an_honest_one(boundary: Boundary) -> None:
    """One of 4 kB, 650 times all subjects, took a second of the broker's processor where 6,000 were stored."""
    js = boundary.operator.js
    for number in range(0, 2000, 100):
        said = (f"connito.v1.{RUN}.ingress.{at}.commitment" for at in range(number, number + 100))
        await asyncio.gather(*(js.publish(subject, b"x") for subject in said))
    attacker = await boundary.hostile()
    reading = attacker.clients["miners-read"]
    of = f"{ASKED}.INGRESS.{attacker.identity.public}"
    await reading.publish(of, json.dumps({"multi_last": [">"] * 650}).encode(), reply="nowhere")
    await attacker.settle()
    assert not reading.is_connected
    # What a program asks at most: the longest names that there can be.
    longest = f"connito.v1.{'r' * 80}.ingress.{'U' * 56}.commitment.part.{'9' * 20}.{'9' * 20}"
    for question in (
        {"last_by_subj": longest},
        {"seq": 1, "batch": 256, "max_bytes": 1 << 18, "next_by_subj": f"connito.v1.{'r' * 80}.ingress.*.*"},
    ):
        honest = await boundary.hostile()
        of = f"{ASKED}.INGRESS.{honest.identity.public}"
        answer = await honest.clients["miners-read"].request(of, json.dumps(question).encode(), timeout=5)
        assert (answer.headers or {})["Status"] == "404"


@contextmanager
def deaf(boundary: Boundary, identity: Identity, questions: int) -> Iterator[socket.socket]:
    """A connection that asks for all of a stream, many times over, and reads none of it."""
    token = identity.passes[-1]
    with socket.create_connection(("127.0.0.1", boundary.server.port), timeout=30) as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        nonce = json.loads(link.makefile("rb").readline().removeprefix(b"INFO "))["nonce"]
        signature = base64.urlsafe_b64encode(identity.sign_nonce(nonce.encode())).rstrip(b"=").decode()
        connect = {"jwt": token, "sig": signature, "nkey": identity.public, "verbose": False, "headers": True}
        inbox, body = f"{ANSWERED}.{identity.public}.a", b'{"seq":1,"batch":1000000}'
        of = f"{ASKED}.MERGE.{identity.public}"
        asked = b"PUB %s %s %d\r\n%s\r\n" % (of.encode(), inbox.encode(), len(body), body)
        link.sendall(f"CONNECT {json.dumps(connect)}\r\nSUB {inbox} 1\r\n".encode() + questions * asked)
        yield link


async def test_who_asks_and_does_not_read_fills_no_memory(boundary: Boundary) -> None:
    """One key, twenty connections: what they asked for and left was 12 GB after half a minute, and nobody else was answered."""
    js = boundary.operator.js
    for cycle in range(600):
        await js.publish(f"connito.v1.{RUN}.merge.{cycle}.scored", bytes(60_000))
    assert boundary.server.process is not None
    server, attacker = psutil.Process(boundary.server.process.pid), boundary.newcomer()
    before, peak, slowest = server.memory_info().rss, 0, 0.0
    with ExitStack() as stack:
        for _ in range(20):
            await asyncio.to_thread(stack.enter_context, deaf(boundary, attacker, questions=20))
        ends = time.monotonic() + 6
        while time.monotonic() < ends:
            began = time.monotonic()
            await js.publish(f"connito.v1.{RUN}.merge.{began}.scored", b"", timeout=5)
            slowest, peak = max(slowest, time.monotonic() - began), max(peak, server.memory_info().rss)
            await asyncio.sleep(0.05)
    print(f"{(peak - before) / 20e6:.1f} MB for each connection; slowest answer {slowest:.2f} s")
    assert peak - before < 20 * (64 << 20)
    assert slowest < 4


async def test_strangers_leave_room_for_services(boundary: Boundary) -> None:
    """The server has one limit for all connections, and services need theirs when they come back."""
    assert sum(account.connections for account in ACCOUNTS.values()) < 60_000
    account = dataclasses.replace(ACCOUNTS["customers"], connections=5)
    with patch.dict(ACCOUNTS, {"customers": account}):
        boundary.access.accounts.make()
        await boundary.access.accounts.push(boundary.server.url)
    customer = boundary.newcomer("customer")
    links = [await log_in(boundary.server.url, customer, customer.passes[0]) for _ in range(5)]
    with pytest.raises(Exception, match=r"(?i)maximum account active connections"):
        await log_in(boundary.server.url, customer, customer.passes[0])
    await boundary.bus(boundary.key("coordinator"))
    for link in links:
        await link.close()


async def test_a_key_holds_its_share_of_connections_and_no_more(boundary: Boundary) -> None:
    """Before the guard was there and while it is; whoever was first stays."""

    async def crowd(key: Identity, number: int) -> list[Client]:
        links = [await log_in(boundary.server.url, key, key.passes[-1]) for _ in range(number)]
        boundary.opened.extend(links)
        return links

    async def thinned(links: Sequence[Client]) -> list[bool]:
        async with asyncio.timeout(PATIENCE):
            while sum(link.is_connected for link in links) > SHARE:  # noqa: ASYNC110 - the library tells nobody
                await asyncio.sleep(0.02)
        return [link.is_connected for link in links]

    collect()  # What other tests left.
    early, late, honest = boundary.newcomer(), boundary.newcomer(), await boundary.bus(boundary.newcomer())
    before = await crowd(early, SHARE + 5)
    services = [await boundary.bus(boundary.key("coordinator")) for _ in range(SHARE + 5)]
    committer = boundary.key("committer")
    watching = asyncio.create_task(Guard(boundary.server.url, committer, "committer", PLAIN).watch())
    assert await thinned(before) == [True] * SHARE + [False] * 5
    began = time.monotonic()
    crowded = await crowd(late, 3 * SHARE)
    assert await thinned(crowded) == [True] * SHARE + [False] * 2 * SHARE
    assert time.monotonic() - began < 5
    await crowded[0].close()
    (again,) = await crowd(late, 1)
    await boundary.bus(late)
    await again.flush()
    assert all(service.connected for service in services)
    await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    assert {offence.key for offence in collect() if offence.kind == "connections"} == {early.public, late.public}
    assert not watching.done()
    await end_tasks([watching])


async def test_who_says_to_be_somebody_else_is_closed(boundary: Boundary, capsys: pytest.CaptureFixture[str]) -> None:
    """The server tells what a client says of itself: one key had any number of names, or another's."""
    collect()  # What other tests left.
    victim, liar = boundary.newcomer(), boundary.newcomer()
    watching = asyncio.create_task(Guard(boundary.server.url, boundary.key("committer"), "committer", PLAIN).watch())

    async def says(name: str) -> Client:
        def lying(client: Client) -> bytes:
            word, _, said = honest(client).partition(b" ")
            return bytes(word) + b" " + json.dumps(json.loads(said) | {"user": name}).encode() + b"\r\n"

        honest = Client._connect_command
        with patch.object(Client, "_connect_command", lying):
            link = await log_in(boundary.server.url, liar, liar.passes[-1])
        boundary.opened.append(link)
        return link

    false = [await says(victim.public) for _ in range(SHARE + 2)] + [await says(f"u{number}") for number in range(5)]
    bus = await boundary.bus(victim)
    async with asyncio.timeout(PATIENCE):
        while any(link.is_connected for link in false):  # noqa: ASYNC110 - the library tells nobody
            await asyncio.sleep(0.02)
    await bus.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    assert bus.connected
    (told,) = [offence for offence in collect() if offence.kind == "not_permitted"]
    assert (told.key, told.count) == (liar.public, len(false))
    assert "connection" not in "".join(capsys.readouterr()), "as many as one likes leave no line each"
    await end_tasks([watching])


async def test_a_guard_outlives_its_broker(boundary: Boundary) -> None:
    """It stands beside the committer, which must not end with it."""
    watching = asyncio.create_task(Guard(boundary.server.url, boundary.key("committer"), "committer", PLAIN).watch())
    await boundary.operator.close()
    for _ in range(2):
        await asyncio.to_thread(boundary.server.stop)
        await asyncio.sleep(1.5 * ANSWERS_SECONDS)
        boundary.server.start()
        await asyncio.sleep(0.5 * ANSWERS_SECONDS)
    key = boundary.newcomer()
    links = [await log_in(boundary.server.url, key, key.passes[-1]) for _ in range(SHARE + 3)]
    boundary.opened.extend(links)
    async with asyncio.timeout(PATIENCE):
        while sum(link.is_connected for link in links) > SHARE:
            assert not watching.done()
            await asyncio.sleep(0.02)
    await end_tasks([watching])


async def test_a_committer_that_is_put_out_guards_nothing(boundary: Boundary) -> None:
    committer, accounts = boundary.key("committer"), boundary.access.accounts
    links = [await log_in(boundary.server.url, committer, token) for token in committer.passes]
    assert len(links) == 2
    accounts.revoke([committer.public])
    await accounts.push(boundary.server.url)
    async with asyncio.timeout(PATIENCE):
        while any(link.is_connected for link in links):  # noqa: ASYNC110 - the library tells nobody
            await asyncio.sleep(0.02)
    for token in committer.passes:
        with pytest.raises(Exception, match=r"(?i)authorization|revoked"):
            await log_in(boundary.server.url, committer, token)
    await accounts.push(boundary.server.url)


async def test_a_burst_is_what_its_sender_waits_for(boundary: Boundary) -> None:
    """Twenty thousand messages in half a second, which the broker would sync one by one while everybody else waits."""
    honest, attacker = await boundary.bus(boundary.newcomer()), await boundary.hostile()
    key, client = attacker.identity, attacker.clients["miners-say"]
    burst = []
    for number in range(20_000):
        subject = ingress(f"made-up-{number}", key.public, "trained")
        burst.append((subject, seal(key, subject, cycle_pb2.TrainingFinished(cycle=1)).SerializeToString()))
    for subject, data in burst:
        await client.publish(subject, data)
    await client.flush()
    began = time.monotonic()
    await honest.publish_ingress(RUN, "trained", cycle_pb2.TrainingFinished(run=RUN, cycle=1))
    assert time.monotonic() - began < 5
    assert (await boundary.state())["INGRESS"][1] < len(burst) // 2
