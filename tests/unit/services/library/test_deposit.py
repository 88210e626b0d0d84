"""What a depositor refuses before it reads any artifact."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast
from weakref import WeakSet

import pytest
from connito.bus import Bus, CaughtUp
from connito.errors import Invalid, Retry
from connito.library.record import build_record
from connito.library.scores import SCORING_SECONDS, benchmark_key, ends_wait
from connito.protocol.findings import PROTOCOL_VERSION
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, run_pb2
from connito.wire import subjects
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from google.protobuf.message import Message

from services.library.actions import Depositor
from tests.support.run import Run
from tests.support.waiting import PATIENCE

LIBRARY = Identity.generate(b"library".ljust(32))
COORDINATOR = Identity.generate(b"coordinator".ljust(32))
AGGREGATOR = Identity.generate(b"aggregator".ljust(32))
VALIDATOR = Identity.generate(b"validator".ljust(32))


def record(sequence: int, kind: str, message: run_pb2.RunCreated | run_pb2.RunEnded) -> Record:
    subject = subjects.fact("r", "run", 0, kind)
    return Record("RUNS", sequence, subject, seal(COORDINATOR, subject, message).SerializeToString(), 0)


class Stored:
    """A broker that holds these records."""

    def __init__(self, *records: Record, now: float = 0.0) -> None:
        self.records, self.identity, self.now = records, LIBRARY, now
        self.written: list[tuple[str, str, run_pb2.RunPaused]] = []
        self.told, self.news = asyncio.Event(), list[Record]()
        self.reads, self.most, self.alive = 0, 0, WeakSet[Record]()

    async def publish_fact(
        self, run: str, section: str, cycle: int, kind: str, message: run_pb2.RunPaused, id_: str
    ) -> bool:
        assert (section, cycle, id_) == ("run", 0, LIBRARY.public)
        self.written.append((run, kind, message))
        return True

    async def time(self) -> float:
        """The broker's clock."""
        return self.now

    async def follow(self, streams: Sequence[str], _run: str) -> AsyncIterator[Record | CaughtUp]:
        """Yield what is stored in these streams, and more as soon as it is told."""
        self.reads += 1
        for each in self.records:
            if each.stream in streams:
                yield each
        yield CaughtUp()
        await self.told.wait()
        while self.news:
            made = self.news.pop(0)
            self.alive.add(made)
            yield made
            del made
            self.most = max(self.most, len(self.alive))
        await asyncio.Event().wait()

    async def stored(self, _streams: Sequence[str], _run: str) -> AsyncIterator[Record]:
        for each in self.records:
            yield each


async def test_a_run_under_newer_rules_is_left_to_newer_programs() -> None:
    spec = run_pb2.RunSpec(run="r", protocol_version=PROTOCOL_VERSION + 1)
    ended = record(2, "ended", run_pb2.RunEnded(run="r", outcome=run_pb2.RUN_OUTCOME_COMPLETED))
    bus: Any = Stored(record(1, "created", run_pb2.RunCreated(spec=spec)), ended)
    roster, log = Roster({"coordinator": frozenset({COORDINATOR.public})}), cast(Any, None)

    with pytest.raises(Invalid, match="upgrade"):
        await Depositor(cast(Bus, bus), cast(ArtifactStore, None), roster, log).handle(ended)
    ((run, kind, notice),) = bus.written
    assert (run, kind, notice.service, notice.action) == ("r", "paused", "library", "deposit")
    assert "upgrade" in notice.detail


class Given(Depositor):
    """A depositor whose broker has these facts, and that deposits by keeping the record's part on scores."""

    def __init__(self, bus: Stored, run: Run) -> None:
        roster = Roster({"aggregator": frozenset({AGGREGATOR.public})})
        super().__init__(cast(Bus, bus), cast(ArtifactStore, None), roster, cast(Any, None))
        self.run, self.stored, self.made = run, bus, list[Any]()

    async def _read_run(self, run: str) -> Any:
        self.stored.reads += 1
        for _, _, message in self.stored.written:
            self.run.put("run", 0, "paused", message, message.key)
        self.stored.written.clear()
        return self.run.facts

    async def _deposit(self, facts: Any, decision: Any) -> Any:
        self.made.append(build_record(facts, "e" * 64, 1, 1).get("unscored", {}))
        raise Invalid("enough")

    async def tell(self, record: Record, error: Invalid) -> None:
        """Say nothing."""


def finished() -> Run:
    run = Run(name="r", step_ms=1).created(cycles=1).selected().miners("UA").opened("train", 1)
    run.facts.require_spec().tasks.add(domain="quiz")
    version = cycle_pb2.VersionPublished(run="r", cycle=1, version=1, gate=cycle_pb2.GATE_DECISION_ACCEPTED)
    return run.put("merge", 1, "version", version).ended()


async def test_scores_that_nobody_writes_are_waited_for_until_they_are_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """An aggregator of before, or one whose scoring was set aside unheard, must not keep an expert from the library."""
    run = finished()
    ended = run.facts.ended_fact
    assert ended is not None
    monkeypatch.setattr("services.library.actions.verify_fact", lambda *_: ended)
    bus = Stored(now=ended.time_unix_ms / 1000 + SCORING_SECONDS - 1)
    library = Given(bus, run)
    with pytest.raises(Retry, match="not scored on its benchmarks yet"):
        await library.handle(cast(Any, None))
    for _ in range(50):
        with pytest.raises(Retry, match="not scored on its benchmarks yet"):
            await library.handle(cast(Any, None))
        await asyncio.sleep(0)
    assert not library.made
    assert bus.reads == 2, "the log is read once, and then followed"
    bus.now += 1
    (awaited,) = library._awaited.values()
    async with asyncio.timeout(PATIENCE):
        await awaited
    with pytest.raises(Invalid, match="enough"):
        await library.handle(cast(Any, None))
    assert library.made == [{"quiz": "no aggregator scored it within 2 hours"}]
    (notice,) = [fact.message for fact in run.facts.many(run_pb2.RunPaused, "run", 0, "paused").values()]
    assert (notice.service, notice.action) == ("library", benchmark_key("r"))
    assert run.facts.paused == [], "whoever waits for the expert must not take this for the end of it"


def said(sequence: int, by: Identity, section: str, kind: str, message: Message, id_: str = "") -> Record:
    subject = subjects.fact("r", section, 0, kind, id_)
    stream = "LIBRARY" if section == "library" else "RUNS"
    return Record(stream, sequence, subject, seal(by, subject, message).SerializeToString(), 0)


def paused(number: int, by: Identity, action: str, service: str = "aggregator") -> Record:
    message = run_pb2.RunPaused(run="r", key=by.public, service=service, action=action, detail="no harness")
    return said(number, by, "run", "paused", message, by.public)


@pytest.mark.parametrize(
    ("news", "ends"),
    [
        (said(1, AGGREGATOR, "library", "benchmarked", run_pb2.BenchmarksMeasured(run="r")), True),
        (paused(1, AGGREGATOR, benchmark_key("r")), True),
        (paused(1, AGGREGATOR, "merge"), False),
        # A notice that a record would not take for one.
        (paused(1, VALIDATOR, benchmark_key("r"), "validator"), False),
        (said(1, LIBRARY, "library", "benchmarked", run_pb2.BenchmarksMeasured(run="r")), False),
        (said(1, AGGREGATOR, "library", "benchmarked", run_pb2.BenchmarksMeasured(run="another")), False),
    ],
)
async def test_what_ends_the_wait_for_scores_is_said_by_who_may(news: Record, ends: bool) -> None:
    keys = {"aggregator": AGGREGATOR, "library": LIBRARY, "validator": VALIDATOR}
    roster = Roster({role: frozenset({key.public}) for role, key in keys.items()})
    assert ends_wait(news, roster) is ends


async def test_scores_that_come_end_the_wait_and_nothing_of_the_log_is_kept_until_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = finished()
    ended = run.facts.ended_fact
    assert ended is not None
    monkeypatch.setattr("services.library.actions.verify_fact", lambda *_: ended)
    bus = Stored(now=ended.time_unix_ms / 1000)
    library = Given(bus, run)
    with pytest.raises(Retry, match="not scored on its benchmarks yet"):
        await library.handle(cast(Any, None))
    bus.news = [paused(number, AGGREGATOR, "merge") for number in range(1, 200)]
    bus.news.append(said(200, AGGREGATOR, "library", "benchmarked", run_pb2.BenchmarksMeasured(run="r")))
    run.put("library", 0, "benchmarked", run_pb2.BenchmarksMeasured(run="r"))
    bus.told.set()
    async with asyncio.timeout(PATIENCE):
        await library._awaited["r"]
    assert 0 < bus.most <= 2
    assert not bus.news, "what was read before did not end it"
    with pytest.raises(Invalid, match="enough"):
        await library.handle(cast(Any, None))
    assert library.made == [{}]


async def test_an_older_notice_of_the_library_keeps_nothing_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished()
    ended = run.facts.ended_fact
    assert ended is not None
    monkeypatch.setattr("services.library.actions.verify_fact", lambda *_: ended)
    run.say("run", 0, "paused", key=LIBRARY.public, service="library", action="deposit", detail="upgrade it")
    bus = Stored(now=ended.time_unix_ms / 1000 + SCORING_SECONDS)

    async def known(*_: object) -> bool:
        return False

    monkeypatch.setattr(bus, "publish_fact", known)
    library = Given(bus, run)
    with pytest.raises(Invalid, match="enough"):
        await library.handle(cast(Any, None))
    assert library.made == [{}]
