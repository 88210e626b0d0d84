"""A miner whose message is dropped: what it sees of that, and what it can show to others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from connito.audit.artifacts import gather
from connito.audit.audit import Audit, Options, audit
from connito.errors import Invalid
from connito.wire.fact import Record
from connito.wire.subjects import ingress

from services.trainer.state import CycleProgress, read_progress
from tests.sim.broker import Broker, Stored
from tests.sim.checks import Objects, evidence_of, wrong_with
from tests.sim.world import Scenario, World, carry_out, forget
from tests.unit.connito.audit.world import RUN


class Deaf(World):
    """The operator's broker acknowledges the commitment of one miner, and stores nothing."""

    def make_broker(self) -> Broker:
        world, dropped = self, list[str]()

        class Planted(Broker):
            def store(self, subject: str, data: bytes, headers: Any) -> dict[str, Any] | None:
                if subject == ingress(RUN, world.censored, "commitment") and not dropped:
                    dropped.append(subject)
                    return {"stream": "INGRESS", "seq": len(self.streams["INGRESS"]) + 1}
                return super().store(subject, data, headers)

        return Planted(self.loop, Random(f"broker {self.seed}"), self.scenario.weather)

    @property
    def censored(self) -> str:
        return next(node.identity.public for node in self.nodes if node.name == "miner-0")


@pytest.fixture(scope="module")
def deaf() -> Iterator[World]:
    world = carry_out(2, Scenario(), Deaf)
    yield world
    forget(world)


@pytest.fixture
def heard() -> Iterator[World]:
    world = carry_out(2, Scenario())
    yield world
    forget(world)


def work(world: World) -> Path:
    return world.folder / "miner-0" / "work" / RUN


def receipts(world: World) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((work(world) / "receipts").iterdir())}


def progress(world: World, cycle: int) -> CycleProgress:
    return read_progress(work(world) / str(cycle) / "progress.json")


def look(world: World, kept: dict[str, str]) -> Audit:
    evidence = evidence_of(world)
    return audit(evidence, asyncio.run(gather(evidence, Objects(world))), Options(False, 0, 0.0, kept=kept))


def lost(world: World, at: int) -> None:
    """The log of an operator that took a message out, and moved the others up."""
    stream = world.broker.streams["INGRESS"]
    del stream[at]
    for place, one in enumerate(stream[at:], at + 1):
        record = one.record
        again = Record("INGRESS", place, record.subject, record.data, record.time_unix_ms)
        stream[place - 1] = Stored(again, one.headers)


def test_who_was_acknowledged_and_not_stored_sees_that_no_receipt_is_for_it(deaf: World) -> None:
    assert wrong_with(deaf) == []
    mine = progress(deaf, 1)
    dropped = mine.places[1]
    assert any(told == f"left-out-{dropped}" for told in mine.told)
    assert f"1-{dropped}.checkpoint" not in receipts(deaf)
    assert look(deaf, receipts(deaf)).blame == [], "what nobody signed for is held against nobody"


def test_who_was_heard_has_a_receipt_for_each_message(heard: World) -> None:
    assert {f"1-{place}.checkpoint" for place in progress(heard, 1).places} & receipts(heard).keys()
    assert not [told for told in progress(heard, 1).told if told.startswith("left-out")]
    assert look(heard, receipts(heard)).differences == []


@pytest.mark.parametrize("kind", ["trained", "commitment", "reveal"])
def test_what_was_acknowledged_and_taken_out_later_is_held_against_the_operator(heard: World, kind: str) -> None:
    key = next(node.identity.public for node in heard.nodes if node.name == "miner-0")
    kept, stream = receipts(heard), heard.broker.streams["INGRESS"]
    lost(heard, next(place for place, one in enumerate(stream) if one.record.subject == ingress(RUN, key, kind)))
    found = look(heard, kept)
    assert "operator" in found.blame
    assert {one.where for one in found.differences if one.check == "history"} <= kept.keys()
    assert any(one.check == "history" for one in found.differences)


def test_a_receipt_of_the_same_run_on_another_platform_proves_nothing(heard: World, deaf: World) -> None:
    """Another committer's key, which this roster does not have."""
    other = carry_out(3, Scenario())
    try:
        for name, note in receipts(other).items():
            with pytest.raises(Invalid, match="proves nothing"):
                look(heard, {name: note})
    finally:
        forget(other)
