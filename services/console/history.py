"""A run's facts in the order of the broker's clock, and the run as it was at any point of them."""

from __future__ import annotations

from dataclasses import dataclass

from connito.views.live import announce
from connito.views.run_report import miner_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Moment:
    """The position of a replay: after the first `position` of `length` facts."""

    position: int
    length: int
    time_unix_ms: int
    seconds: float
    text: str

    @property
    def first(self) -> bool:
        """Return whether there is nothing before it."""
        return self.position <= 1

    @property
    def last(self) -> bool:
        """Return whether this is all there is."""
        return self.position >= self.length


def in_order(facts: RunFacts) -> list[Fact]:
    """Return facts by the broker's time; ties within a millisecond go by stream."""
    return sorted(facts.facts.values(), key=lambda fact: (fact.time_unix_ms, fact.stream, fact.sequence))


def replay(facts: RunFacts, position: int) -> tuple[RunFacts, Moment]:
    """Return the run after its first `position` facts (taken into 1 … number of facts)."""
    ordered = in_order(facts)
    position = max(1, min(position, len(ordered)))
    past = RunFacts(facts.run)
    for fact in ordered[:position]:
        past.add(fact)
    last = ordered[position - 1]
    seconds = (last.time_unix_ms - ordered[0].time_unix_ms) / 1000
    return past, Moment(position, len(ordered), last.time_unix_ms, seconds, _say(last, past))


def _say(fact: Fact, facts: RunFacts) -> str:
    key = fact.key
    where = f"cycle {key.cycle} · " if key.cycle else ""
    who = f" · {miner_name(facts, key.id)}" if key.id else ""
    return announce(fact, facts, {}) or f"{where}{key.section} · {key.kind.replace('_', ' ')}{who}"
