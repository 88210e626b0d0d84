"""What a lagging replica does not show yet is not taken for gone: that is the leader's to say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.bus import Bus, absent, position
from connito.bus.connection import Connection
from connito.bus.position import PositionedLog
from connito.errors import Invalid, Retry
from connito.v1 import cycle_pb2
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.parts import split
from connito.wire.roster import Roster
from connito.wire.subjects import fact

SIGNER = Identity.generate(b"a" * 32)
ROSTER = Roster({"aggregator": frozenset({SIGNER.public})})
STAMP = "2026-11-26T13:16:43.779441275Z"


class Broker:
    """A connection to one replica, which may lack what the leader has."""

    def __init__(self, leader: dict[str, bytes], *, stranger: bool = False) -> None:
        self.leader, self.replica, self.stranger = leader, dict(leader), stranger
        self.asked: list[str] = []
        self.then: Callable[[], None] = lambda: None

    def stored_in(self, stream: str) -> str:
        return f"$JS.API.DIRECT.GET.{stream}"

    async def request(self, subject: str, data: bytes) -> Any:
        self.asked.append(subject)
        body = json.loads(data)
        if "MSG.GET" in subject:
            assert not self.stranger
            self.then()
            there = "next_by_subj" in body or body["last_by_subj"] in self.leader
            answer = {"message": {}} if there else {"error": {"code": 404, "err_code": 10037}}
            return SimpleNamespace(data=json.dumps(answer).encode())
        found = self.replica.get(body["last_by_subj"])
        if found is None:
            return SimpleNamespace(headers={"Status": "404"}, data=b"")
        headers = {"Nats-Subject": body["last_by_subj"], "Nats-Sequence": "1", "Nats-Time-Stamp": STAMP}
        return SimpleNamespace(headers=headers, data=found)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(position, "LOOK_SECONDS", 0.001)
    monkeypatch.setattr(absent, "LAG_SECONDS", 0.001)


def bus_of(broker: Broker) -> Bus:
    connection = cast(Connection, broker)
    return Bus(connection, connection, ROSTER)


class Ending:
    """A bus whose leader has stored two messages; `left` says whether there is one behind what was read."""

    def __init__(self, left: list[bool]) -> None:
        self.left, self.asked, self.often = left, list[dict[str, Any]](), asyncio.Event()

    async def last_sequence(self, stream: str) -> int:
        return 2

    async def gone(self, stream: str, **which: Any) -> bool:
        self.asked.append(which)
        if len(self.asked) == 10:
            self.often.set()
        return not self.left.pop(0)


def record(sequence: int) -> Record:
    return Record("SUBMIT", sequence, "s", b"", 0)


async def test_the_end_of_a_stream_is_not_read_however_often_it_is_not_there_yet() -> None:
    log, bus = PositionedLog(Roster({})), Ending([True] * 1000)
    log.read(record(1))
    refreshing = asyncio.create_task(log.refresh(cast(Bus, bus), ["SUBMIT"]))
    await bus.often.wait()
    assert not refreshing.done()
    assert bus.asked[0] == {"seq": 2, "next_by_subj": "connito.v1.*.submit.>"}
    log.read(record(2))
    await refreshing


async def test_an_end_that_is_gone_is_not_waited_for() -> None:
    log, bus = PositionedLog(Roster({})), Ending([True, False])
    log.read(record(1))
    await log.refresh(cast(Bus, bus), ["SUBMIT"])
    assert log.position("SUBMIT") == 2


def large() -> tuple[Record, dict[str, bytes]]:
    subject = fact("r", "merge", 1, "scored")
    verdicts = [cycle_pb2.Verdict(miner=f"{n:060}", finding=cycle_pb2.Finding(text="x" * 400)) for n in range(6000)]
    message = cycle_pb2.CycleScored(run="r", cycle=1, verdicts=verdicts)
    parts, head = split(subject, seal(SIGNER, subject, message, now_ms=1, nonce=b"n" * 16))
    stored = {place: seal(SIGNER, place, part, now_ms=1, nonce=b"n" * 16).SerializeToString() for place, part in parts}
    assert stored
    return Record("MERGE", 9, subject, head.SerializeToString(), 0), stored


async def test_parts_that_a_replica_has_not_yet_are_waited_for() -> None:
    head, parts = large()
    broker = Broker(parts)
    last = max(parts)
    del broker.replica[last]
    looks = iter(range(3))
    broker.then = lambda: broker.replica.update(parts) if next(looks) == 2 else None
    assert len((await bus_of(broker).whole(head)).data) > 1_000_000


async def test_a_fact_without_its_parts_is_refused_by_the_word_of_the_leader() -> None:
    head, parts = large()
    del parts[max(parts)]
    broker = Broker(parts)
    with pytest.raises(Invalid, match="lacks 1 of its"):
        await bus_of(broker).whole(head)
    assert sum("MSG.GET" in subject for subject in broker.asked) == 1


async def test_a_stranger_looks_for_a_while_and_asks_no_leader() -> None:
    head, parts = large()
    broker = Broker(parts, stranger=True)
    del broker.replica[max(parts)]
    with pytest.raises(Invalid, match="lacks 1 of its"):
        await bus_of(broker).whole(head)
    assert len(broker.asked) == absent.STRANGERS_LOOKS * len(parts)


async def test_a_leader_that_cannot_say_has_not_said_that_it_is_gone() -> None:
    class Busy(Broker):
        async def request(self, subject: str, data: bytes) -> Any:
            return SimpleNamespace(data=b'{"error": {"code": 503, "err_code": 10008, "description": "no leader"}}')

    with pytest.raises(Retry, match="no leader"):
        await bus_of(Busy({})).gone("MERGE", last_by_subj="x")
