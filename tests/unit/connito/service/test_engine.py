"""A service stands aside in a run whose rules are newer than itself, and waits for what is wrong with its surroundings."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import cast

import pytest
from connito.bus import Bus, CaughtUp
from connito.errors import Fatal, Invalid, ObjectDamaged, ObjectMissing, Retry, Unusable
from connito.protocol.findings import PROTOCOL_VERSION
from connito.runtime.host import HOST
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import WAITING
from connito.service.engine import FEW, Action, Decision, Engine
from connito.v1 import reasons_pb2, run_pb2
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import FactKey

from tests.support.waiting import PATIENCE


@pytest.mark.parametrize(
    ("version", "asked"), [(PROTOCOL_VERSION - 1, 0), (PROTOCOL_VERSION, 1), (PROTOCOL_VERSION + 1, 0)]
)
def test_a_run_under_other_rules_is_left_alone(version: int, asked: int) -> None:
    decided = []

    def decide(facts: RunFacts, _now_ms: int) -> Decision:
        decided.append(facts.run)
        return Decision()

    async def perform(action: Action) -> None:
        raise AssertionError(action)

    log = Log(Roster({}))
    spec = run_pb2.RunSpec(run="r", protocol_version=version)
    facts = log.runs.setdefault("r", RunFacts("r"))
    facts.add(Fact("r", FactKey("run", 0, "created"), run_pb2.RunCreated(spec=spec), "K", "RUNS", 1, 0))
    engine = Engine(cast(Bus, Still()), log, ("RUNS",), decide, perform)

    engine._decide_run("r", 0)
    engine._decide_run("r", 1)

    assert len(decided) == 2 * asked


class Still:
    """A broker that has nothing new."""

    host = HOST

    async def follow(self, *_: object, **__: object) -> AsyncIterator[CaughtUp]:
        yield CaughtUp()
        await asyncio.Event().wait()


def engine_for(failures: Iterator[Exception | None], done: asyncio.Event, tried: list[int]) -> Engine:
    """An engine with one action in a run, which meets these failures until one is None."""
    log = Log(Roster({}))
    log.runs["r"] = RunFacts("r")

    async def perform(action: Action) -> None:
        tried.append(1)
        if (failure := next(failures)) is not None:
            raise failure
        done.set()

    def decide(facts: RunFacts, _now_ms: int) -> Decision:
        return Decision() if done.is_set() else Decision([Action("r/merge", "r")])

    return Engine(cast(Bus, Still()), log, ("RUNS",), decide, perform)


@pytest.mark.parametrize(
    "fault",
    [
        ObjectMissing("gone"),
        ObjectDamaged("rotten"),
        Unusable("full", dependency="disk", reason=reasons_pb2.REASON_STORE_UNAVAILABLE),
        Unusable("denied", dependency="credentials", reason=reasons_pb2.REASON_NOT_PERMITTED),
        OSError(errno.ENOSPC, "No space left on device"),
        MemoryError(),
        Retry("away", after=0.001),
    ],
    ids=lambda fault: type(fault).__name__,
)
async def test_an_action_that_meets_a_fault_of_the_environment_goes_on_when_it_is_repaired(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as it takes, and without a restart."""
    monkeypatch.setattr("connito.runtime.waiting.delay", lambda after, failures: 0.0)
    monkeypatch.setattr("connito.service.engine.SOONEST_MS", 0)
    done, tried = asyncio.Event(), list[int]()
    engine = engine_for(iter([fault] * 150 + [None]), done, tried)
    running = asyncio.create_task(engine.run())
    await asyncio.wait_for(done.wait(), 10)
    running.cancel()
    assert len(tried) == 151


async def test_what_is_about_content_is_not_tried_again() -> None:
    done, tried = asyncio.Event(), list[int]()
    engine = engine_for(iter([Invalid("wrong"), None]), done, tried)
    running = asyncio.create_task(engine.run())
    while not tried:  # noqa: ASYNC110 - the engine's turn
        await asyncio.sleep(0)
    for _ in range(3):
        engine.wake("r")
        await asyncio.sleep(0.01)
    running.cancel()
    assert len(tried) == 1


async def test_what_was_given_up_goes_on_after_somebody_has_mended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a start of the service."""
    monkeypatch.setattr("connito.service.engine.GIVEN_UP_SECONDS", 0.05)
    done, tried = asyncio.Event(), list[int]()
    engine = engine_for(iter([Invalid("a file of the base is damaged"), None]), done, tried)
    running = asyncio.create_task(engine.run())
    while not tried:  # noqa: ASYNC110 - the engine's turn
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [(one.given_up, one.error) for one in WAITING.entries()] == [(True, "a file of the base is damaged")]
    await asyncio.wait_for(done.wait(), 10)
    await asyncio.sleep(0)
    assert WAITING.entries() == []
    running.cancel()


async def test_a_clock_that_is_set_back_holds_no_action_up() -> None:
    """The broker's is when its machine's is set, and when another node of a cluster answers. What waits for its next try, or
    because deciding takes long, waits so many seconds, and not until the clock shows that time again."""
    log, ahead, tried, over = Log(Roster({})), [0], list[int](), asyncio.Event()
    log.runs["r"] = RunFacts("r")

    async def perform(action: Action) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise Retry("away", after=0.05)
        over.set()

    def decide(facts: RunFacts, _now_ms: int) -> Decision:
        time.sleep(0.003)  # So long that the next decision has to wait.
        return Decision([] if over.is_set() else [Action("r/merge", "r")])

    def clock() -> int:
        return round(HOST.monotonic() * 1000) + ahead[0]

    running = asyncio.create_task(Engine(cast(Bus, Still()), log, ("RUNS",), decide, perform, clock=clock).run())
    async with asyncio.timeout(PATIENCE):
        while not WAITING.entries():  # noqa: ASYNC110 - the engine's turn
            await asyncio.sleep(0)
        ahead[0] = -1_800_000
        await over.wait()
    await end_tasks([running])


async def test_a_clock_that_is_set_forward_brings_what_is_due_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connito.service.engine.LOOK_MS", 10)
    log, ahead, told, due = Log(Roster({})), [0], list[int](), round(HOST.monotonic() * 1000) + 900_000
    log.runs["r"] = RunFacts("r")

    async def perform(action: Action) -> None:
        raise AssertionError(action)

    def decide(facts: RunFacts, now_ms: int) -> Decision:
        told.append(now_ms)
        return Decision(wake_at_ms=due)

    def clock() -> int:
        return round(HOST.monotonic() * 1000) + ahead[0]

    running = asyncio.create_task(Engine(cast(Bus, Still()), log, ("RUNS",), decide, perform, clock=clock).run())
    async with asyncio.timeout(PATIENCE):
        while not told:  # noqa: ASYNC110 - the engine's turn
            await asyncio.sleep(0)
        ahead[0] = 1_800_000
        while max(told) < due:  # noqa: ASYNC110 - the engine's turn
            await asyncio.sleep(0.001)
    await end_tasks([running])


async def test_nobody_is_shown_to_wait_for_what_is_not_asked_for_any_more() -> None:
    """Another replica has done it meanwhile, or its acknowledgement was lost and the fact came through the log."""
    done, tried = asyncio.Event(), list[int]()
    engine = engine_for(iter([Retry("the broker is away", after=60.0, dependency="broker")]), done, tried)
    running = asyncio.create_task(engine.run())
    while not WAITING.entries():  # noqa: ASYNC110 - the engine's turn
        await asyncio.sleep(0)
    done.set()
    engine.wake("r")
    async with asyncio.timeout(20):
        while WAITING.entries():  # noqa: ASYNC110 - the engine's turn
            await asyncio.sleep(0)
    await end_tasks([running])


async def test_what_is_done_is_forgotten_and_what_is_not_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service lives for thousands of cycles, and each has actions of its own."""
    monkeypatch.setattr("connito.service.engine.SETTLE_MS", 0)
    over, done = asyncio.Event(), list[str]()
    log = Log(Roster({}))
    log.runs["r"] = RunFacts("r")

    async def perform(action: Action) -> None:
        if action.key == "r/away":
            raise Retry("the store is away", after=60.0, dependency="store")
        if action.key.startswith("r/late"):
            raise Retry("it is over before this can be done", after=0.0, dependency="store")
        done.append(action.key)
        if len(done) == 500:
            over.set()

    def decide(facts: RunFacts, _now_ms: int) -> Decision:
        cycle = [] if over.is_set() else [Action(f"r/{what}/{len(done)}", "r") for what in ("merge", "late")]
        return Decision([Action("r/away", "r"), *cycle])

    engine = Engine(cast(Bus, Still()), log, ("RUNS",), decide, perform)
    running = asyncio.create_task(engine.run())
    async with asyncio.timeout(PATIENCE):
        await over.wait()
    assert len(engine._actions) <= FEW + 2
    assert engine._actions["r/away"].failures == 1
    await end_tasks([running])


async def test_a_dependency_that_answers_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connito.runtime.waiting.delay", lambda after, failures: 3600.0)
    done, tried = asyncio.Event(), list[int]()
    engine = engine_for(iter([Retry("away", dependency="store"), None]), done, tried)
    running = asyncio.create_task(engine.run())
    while not tried:  # noqa: ASYNC110 - the engine's turn
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    WAITING.answered("disk")
    await asyncio.sleep(0.05)
    assert not done.is_set()
    WAITING.answered("store")
    await asyncio.wait_for(done.wait(), 10)
    running.cancel()


class Slow(Still):
    """A machine on which nothing but deciding takes time."""

    def __init__(self) -> None:
        self.seconds, self.host = 100.0, self  # type: ignore[assignment]

    def monotonic(self) -> float:
        return self.seconds


@pytest.mark.parametrize(("takes", "most"), [(0.05, 24), (0.001, 1000)])
def test_deciding_that_takes_long_leaves_time_for_what_it_decides_on(takes: float, most: int) -> None:
    machine, log, decided = Slow(), Log(Roster({})), list[float]()
    log.runs["r"] = RunFacts("r")

    def decide(_facts: RunFacts, _now_ms: int) -> Decision:
        machine.seconds += takes
        decided.append(machine.seconds)
        return Decision()

    async def perform(action: Action) -> None:
        raise AssertionError(action)

    engine = Engine(cast(Bus, machine), log, ("RUNS",), decide, perform)
    for _ in range(1000):
        # A fact every ten milliseconds.
        machine.seconds += 0.01
        engine._decide_run("r", round(machine.seconds * 1000))

    assert most - 5 <= len(decided) <= most
    # And what came last is decided on.
    waits = round(machine.seconds * 1000) < engine._held_until.get("r", 0)
    assert waits == ("r" in engine._wake_at)


class OneFact(Still):
    """A broker with one fact; what is published goes nowhere."""

    async def follow(self, *_: object, **__: object) -> AsyncIterator[Record | CaughtUp]:  # type: ignore[override]
        yield Record("RUNS", 1, "connito.v1.r.run.0.created", b"", 0)
        yield CaughtUp()
        await asyncio.Event().wait()


class Given(Log):
    """A log in which everything verifies, or meets `fault`."""

    fault: Exception | None = None

    def _apply(self, record: Record) -> Fact | None:
        if self.fault is not None:
            raise self.fault
        self.runs.setdefault("r", RunFacts("r"))
        return Fact("r", FactKey("run", 1, "received"), run_pb2.IngressHead(), "K", "RUNS", 1, 0)


def reading(log: Log, on_fact: Callable[[Fact], None] | None = None) -> Engine:
    async def perform(action: Action) -> None:
        raise AssertionError(action)

    def decide(facts: RunFacts, now: int) -> Decision:
        return Decision()

    return Engine(cast(Bus, OneFact()), log, ("RUNS",), decide, perform, on_fact=on_fact, service="committer")


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), MemoryError(), Retry("away")])
async def test_a_fault_of_the_machine_while_a_fact_is_taken_in_condemns_no_run(fault: Exception) -> None:
    def on_fact(fact: Fact) -> None:
        raise fault

    engine = reading(Given(Roster({})), on_fact)
    with pytest.raises(type(fault)):
        await asyncio.wait_for(engine.run(), 5)
    assert "r/reading" not in [wait.what for wait in WAITING.entries()]


@pytest.mark.parametrize("fault", [MemoryError(), Fatal("what was kept is damaged"), OSError(errno.EIO, "broken")])
async def test_neither_does_one_while_it_is_put_with_the_others(fault: Exception) -> None:
    log = Given(Roster({}))
    log.fault = fault
    with pytest.raises(type(fault)):
        await asyncio.wait_for(reading(log).run(), 5)
    assert "r/reading" not in [wait.what for wait in WAITING.entries()]


async def test_a_run_whose_fact_makes_its_reader_fail_is_left() -> None:
    log = Given(Roster({}))
    log.fault = ZeroDivisionError()
    engine = reading(log)
    running = asyncio.create_task(engine.run())
    await asyncio.wait_for(engine.caught_up.wait(), 5)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert "r/reading" in [wait.what for wait in WAITING.entries()]
    WAITING.end("r/reading")
