"""What a run holds makes something fail: that run is left with a named fact, and every other run goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import pytest
from connito.bus import Bus, CaughtUp
from connito.bus.position import PositionedLog
from connito.errors import Fatal, Invalid, Retry
from connito.protocol.findings import PROTOCOL_VERSION
from connito.runtime.host import HOST, Host
from connito.service import engine as engine_module
from connito.service import pausing
from connito.service.engine import Action, Decision, Engine
from connito.v1 import reasons_pb2, run_pb2
from connito.wire.envelope import seal
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import fact
from connito.wire.verification import verify_fact
from google.protobuf.message import Message

from tests.support import waiting

BAD, GOOD = "bad", "good"
until = partial(waiting.until, seconds=20.0)
COORDINATOR = Identity.generate()
ROSTER = Roster({"coordinator": frozenset({COORDINATOR.public})})


@dataclass
class Broker:
    """A broker with what is stored in it, and the facts that were written."""

    stored: list[Record]
    written: list[Any] = field(default_factory=list)
    away: int = 0
    identity: Identity = COORDINATOR
    host: Host = HOST

    async def follow(self, streams: Any, run: str, start: Any, of_all: bool) -> AsyncIterator[Record | CaughtUp]:
        for record in self.stored:
            yield record
        yield CaughtUp()
        await asyncio.Event().wait()

    async def publish_fact(
        self, run: str, section: str, cycle: int, kind: str, message: Message, id_: str = ""
    ) -> bool:
        if self.away:
            self.away -= 1
            raise Retry("away", after=0.001)
        self.written.append((run, section, kind, id_, message))
        return True


def created(run: str, sequence: int) -> Record:
    subject = fact(run, "run", 0, "created")
    message = run_pb2.RunCreated(spec=run_pb2.RunSpec(run=run, protocol_version=PROTOCOL_VERSION))
    return Record("RUNS", sequence, subject, seal(COORDINATOR, subject, message).SerializeToString(), 0)


class Paused(Log):
    """A log in which one message makes its reader fail."""

    def verified(self, record: Record) -> Fact:
        raise KeyError(record.subject)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pausing, "MAX_WAIT", 0.001)
    monkeypatch.setattr(engine_module, "MAX_WAIT", 0.001)
    monkeypatch.setattr(engine_module, "SETTLE_MS", 0)
    monkeypatch.setattr(engine_module, "SOONEST_MS", 1)


@asynccontextmanager
async def running(
    decide: Callable[[RunFacts, int], Decision], perform: Any, service: str = "coordinator", **broker: Any
) -> AsyncIterator[tuple[Engine, Broker]]:
    bus = Broker([created(BAD, 1), created(GOOD, 2)], **broker)
    engine = Engine(cast(Bus, bus), Log(ROSTER), ("RUNS",), decide, perform, service=service)
    task = asyncio.create_task(engine.run())
    try:
        yield engine, bus
        assert not task.done(), "the service died of one run"
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Acts:
    """A decider and an action of which both runs get one after the other; what they do with the bad run is `how`."""

    def __init__(self, how: BaseException, where: str, failures: int = 1 << 30) -> None:
        self.how, self.where, self.done, self.asked, self.failures = how, where, list[str](), 0, failures

    def decide(self, facts: RunFacts, now: int) -> Decision:
        if facts.run == BAD and self.where == "decide" and self.asked < self.failures:
            self.asked += 1
            raise self.how
        return Decision([Action(f"{facts.run}/work", facts.run)], now + 1)

    async def perform(self, action: Action) -> None:
        if action.run == BAD and self.asked < self.failures:
            self.asked += 1
            raise self.how
        self.done.append(action.run)


@pytest.mark.parametrize("where", ["decide", "perform"])
@pytest.mark.parametrize(
    "how",
    [KeyError("x"), RuntimeError("y"), RecursionError(), AssertionError(), UnicodeDecodeError("a", b"", 0, 1, "")],
)
async def test_a_run_that_makes_something_fail_is_left_and_told_of(where: str, how: BaseException) -> None:
    acts = Acts(how, where)
    async with running(acts.decide, acts.perform, away=2) as (_, bus):
        await until(lambda: bool(bus.written))
        before = len(acts.done)
        await until(lambda: len(acts.done) > before + 5)
    ((run, section, kind, id_, message),) = bus.written
    assert (run, section, kind, id_) == (BAD, "run", "paused", COORDINATOR.public)
    assert (message.key, message.service) == (COORDINATOR.public, "coordinator")
    assert message.reason == reasons_pb2.REASON_FAULT
    assert type(how).__name__ in message.detail
    assert acts.asked >= pausing.TRIES
    assert set(acts.done) == {GOOD}


async def test_what_is_not_possible_is_told_with_its_own_reason() -> None:
    acts = Acts(Invalid("it does not fit", reason=reasons_pb2.REASON_OVERSIZED), "perform")
    async with running(acts.decide, acts.perform) as (_, bus):
        await until(lambda: bool(bus.written) and len(acts.done) > 5)
    assert bus.written[0][-1].reason == reasons_pb2.REASON_OVERSIZED
    assert bus.written[0][-1].detail == "it does not fit"
    assert acts.asked == 1


@pytest.mark.parametrize("how", [OSError("disk full"), MemoryError()])
async def test_what_passes_is_tried_for_as_long_as_it_takes(how: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connito.runtime.waiting.delay", lambda after, failures: 0.001)
    acts = Acts(how, "perform")
    async with running(acts.decide, acts.perform) as (_, bus):
        await until(lambda: acts.asked > 3 * pausing.TRIES)
    assert bus.written == []


@pytest.mark.parametrize("where", ["decide", "perform"])
async def test_a_run_that_recovers_goes_on(where: str) -> None:
    acts = Acts(KeyError("x"), where, failures=pausing.TRIES - 1)
    async with running(acts.decide, acts.perform) as (_, bus):
        await until(lambda: BAD in acts.done)
    assert bus.written == []


async def test_a_miner_tells_nobody_and_goes_on_with_other_runs() -> None:
    acts = Acts(KeyError("x"), "perform")
    async with running(acts.decide, acts.perform, service="") as (_, bus):
        await until(lambda: acts.asked == pausing.TRIES and len(acts.done) > 5)
    assert bus.written == []


@pytest.mark.parametrize("where", ["decide", "perform"])
async def test_what_is_fatal_ends_the_service(where: str) -> None:
    acts = Acts(Fatal("the lease is lost"), where)
    engine = Engine(cast(Bus, Broker([created(BAD, 1)])), Log(ROSTER), ("RUNS",), acts.decide, acts.perform)
    with pytest.raises(Fatal):
        async with asyncio.timeout(5):
            await engine.run()


async def test_a_fact_that_makes_its_reader_fail_stops_its_run_alone() -> None:
    done: list[str] = []

    def decide(facts: RunFacts, now: int) -> Decision:
        return Decision([Action(f"{facts.run}/work", facts.run)], now + 1)

    async def perform(action: Action) -> None:
        done.append(action.run)

    def on_fact(fact: Fact) -> None:
        if fact.run == BAD:
            raise KeyError("x")

    bus = Broker([created(BAD, 1), created(GOOD, 2)])
    engine = Engine(cast(Bus, bus), Log(ROSTER), ("RUNS",), decide, perform, on_fact=on_fact, service="coordinator")
    task = asyncio.create_task(engine.run())
    await until(lambda: bool(bus.written) and len(done) > 5)
    assert not task.done()
    assert set(done) == {GOOD}
    assert bus.written[0][-1].action == "reading"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_fact_of_a_service_that_cannot_be_read_stops_its_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def decide(facts: RunFacts, now: int) -> Decision:
        return Decision([Action(f"{facts.run}/work", facts.run)], now + 1)

    async def perform(action: Action) -> None:
        done.append(action.run)

    def read(record: Record, roster: Roster) -> Fact:
        if record.sequence == 3:
            raise KeyError("x")
        return verify_fact(record, roster)

    monkeypatch.setattr("connito.wire.log.verify_fact", read)
    bus = Broker([created(BAD, 1), created(GOOD, 2), replace(created(BAD, 3), subject=fact(BAD, "run", 0, "selected"))])
    engine = Engine(cast(Bus, bus), Log(ROSTER), ("RUNS",), decide, perform, service="coordinator")
    task = asyncio.create_task(engine.run())
    await until(lambda: bool(bus.written) and len(done) > 5)
    assert not task.done()
    assert set(done) == {GOOD}
    assert (bus.written[0][-1].action, bus.written[0][-1].reason) == ("reading", reasons_pb2.REASON_FAULT)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_a_message_that_makes_its_reader_fail_is_invalid() -> None:
    with pytest.raises(Invalid) as caught:
        Paused(ROSTER).apply(Record("INGRESS", 1, "connito.v1.r.ingress.U.reveal", b"", 0))
    assert caught.value.reason == reasons_pb2.REASON_FAULT


def test_only_who_works_on_runs_says_that_it_left_one() -> None:
    stranger = Identity.generate()
    for identity, allowed in ((COORDINATOR, True), (stranger, False)):
        subject = fact(BAD, "run", 0, "paused", identity.public)
        message = run_pb2.RunPaused(run=BAD, key=identity.public, service="coordinator")
        record = Record("RUNS", 3, subject, seal(identity, subject, message).SerializeToString(), 0)
        log = Log(ROSTER)
        log.apply(created(BAD, 1))
        if allowed:
            log.apply(record)
            assert [paused.service for paused in log.runs[BAD].paused] == ["coordinator"]
        else:
            with pytest.raises(Invalid, match="only a worker"):
                log.apply(record)


def test_nobody_says_that_another_service_left_a_run() -> None:
    """One validator could tell a customer that the coordinator had failed, and that nobody would score the expert."""
    key = Identity.generate()
    log = Log(Roster(ROSTER.keys | {"validator": frozenset({key.public})}))
    log.apply(created(BAD, 1))
    for service in ("coordinator", "aggregator", "library", "", "validator"):
        subject = fact(BAD, "run", 0, "paused", key.public)
        message = run_pb2.RunPaused(run=BAD, key=key.public, service=service)
        record = Record("RUNS", 3, subject, seal(key, subject, message).SerializeToString(), 1)
        if service == "validator":
            assert log.apply(record) is not None
        else:
            with pytest.raises(Invalid, match="another service"):
                log.apply(record)


async def test_a_service_keeps_nothing_of_runs_that_do_not_exist() -> None:
    """Though it has read it: who waits for the end of a stream waits for no ghost."""
    ghosts = []
    for number in range(2, 30):
        subject = fact(f"ghost-{number}", "run", 0, "paused", COORDINATOR.public)
        left = run_pb2.RunPaused(run=f"ghost-{number}", key=COORDINATOR.public, service="coordinator")
        ghosts.append(Record("RUNS", number, subject, seal(COORDINATOR, subject, left).SerializeToString(), 0))
    acts, log = Acts(RuntimeError(), "nowhere"), PositionedLog(ROSTER, patience_s=5.0)
    bus = Broker([created(GOOD, 1), *ghosts])
    engine = Engine(cast(Bus, bus), log, ("RUNS",), acts.decide, acts.perform)
    task = asyncio.create_task(engine.run())
    try:
        await log.reach("RUNS", 29)
        assert list(log.runs) == [GOOD]
        await until(lambda: GOOD in acts.done)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
