"""Miners by what they earned over runs: a pure projection of results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from connito.v1 import cycle_pb2
from connito.views.standings import rating_text
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts


@dataclass
class Place:
    """A miner over all runs that were looked at. `earned`: units by run; `judged`, `merged`: submissions; `reasons`: how often
    something of it was refused or counted for less, and why. `rating`: as it was judged last, None before.
    """

    miner: str
    rank: int = 0
    label: str = ""
    judged: int = 0
    merged: int = 0
    rating: cycle_pb2.MinerStanding | None = None
    last_unix_ms: int = 0
    earned: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def reward(self) -> int:
        """Return the units of all runs."""
        return self.earned.total()

    @property
    def why(self) -> str:
        """Return the reasons, the most frequent first: `copy 3, not-significant 1`."""
        return ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())

    @property
    def skill(self) -> str:
        """Return the rating as text; empty before there is one."""
        return rating_text(self._rating())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that `connito miner top --json` prints."""
        counted = {"earned": dict(self.earned), "reasons": dict(self.reasons.most_common())}
        return {**vars(self), **counted, "rating": self._rating(), "reward": self.reward}

    def _rating(self) -> dict[str, float] | None:
        return None if self.rating is None else {"mu": self.rating.mu, "sigma": self.rating.sigma}


def leaderboard(runs: Iterable[RunFacts], until: int | None = None) -> list[Place]:
    """Return who took part in a cycle, the largest reward first; equal rewards share a rank. `until`: its last cycle."""
    places = _Places()
    for facts in runs:
        for cycle in facts.cycles():
            if until is not None and cycle > until:
                break
            _refusals(facts, cycle, places)
            _result(facts, cycle, places)
    ordered = sorted(places.values(), key=lambda place: (-place.reward, -place.merged, place.miner))
    for number, (place, above) in enumerate(zip(ordered, [None, *ordered], strict=False), 1):
        place.rank = above.rank if above is not None and above.reward == place.reward else number
    return ordered


class _Places(dict[str, Place]):
    def __missing__(self, miner: str) -> Place:
        place = self[miner] = Place(miner)
        return place


def _refusals(facts: RunFacts, cycle: int, places: _Places) -> None:
    for window in ("commit", "submit"):
        for fact in facts.window(window, cycle).refused.values():
            place = places[fact.message.miner]
            place.reasons[reason_name(fact.message.reason)] += 1
            place.label = facts.label(place.miner) or place.label


def _result(facts: RunFacts, cycle: int, places: _Places) -> None:
    fact = facts.scored_fact(cycle)
    if fact is None:
        return
    standings = {standing.miner: standing for standing in fact.message.miners}
    for verdict in fact.message.verdicts:
        place = places[verdict.miner]
        place.earned[facts.run] += verdict.reward
        place.judged += 1
        place.merged += verdict.status == cycle_pb2.VERDICT_STATUS_MERGED
        if reason := reason_name(verdict.reason):
            place.reasons[reason] += 1
        if fact.time_unix_ms >= place.last_unix_ms:
            place.last_unix_ms, place.label = fact.time_unix_ms, facts.label(place.miner) or place.label
            place.rating = standings.get(place.miner, place.rating)
