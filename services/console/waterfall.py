"""A cycle as a waterfall: its windows along the broker's clock, who acted in them when, and who came last."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from connito.render.formats import duration
from connito.v1 import cycle_pb2
from connito.views.run_report import miner_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import WINDOWS

# Facts that are somebody acting in a window, and whether the id of the key says who.
_ACTS = {
    "train": (("ingress", "trained"), ("train", "seed")),
    "commit": (("ingress", "commitment"),),
    "submit": (("ingress", "reveal"),),
    "validate": (("validate", "seed"), ("validate", "report")),
    "merge": (("merge", "scored"), ("merge", "version")),
}
# Of these, the ones that a window waits for.
_FINISHING = {"trained", "seed", "commitment", "reveal", "report", "version"}


@dataclass(frozen=True)
class Act:
    """An act of a participant, `at_ms` after the cycle began."""

    who: str
    what: str
    at_ms: int


@dataclass(frozen=True)
class Bar:
    """A window: from `start_ms` to `end_ms` after the cycle began, both by the broker's clock."""

    window: str
    start_ms: int
    end_ms: int
    open: bool
    by_deadline: bool
    acts: tuple[Act, ...]
    missing: tuple[str, ...]

    @property
    def last(self) -> Act | None:
        """Return the last to act, for whom the others waited."""
        return max((act for act in self.acts), key=lambda act: act.at_ms, default=None)

    @property
    def summary(self) -> str:
        """Return the bar as a sentence."""
        parts = [f"{self.window}: {duration((self.end_ms - self.start_ms) / 1000)}{' so far' if self.open else ''}"]
        if self.last is not None:
            parts.append(
                f"last was {self.last.who} ({self.last.what}) after {duration((self.last.at_ms - self.start_ms) / 1000)}"
            )
        if self.missing:
            verb = "waiting for" if self.open else "did not act:"
            parts.append(f"{verb} {', '.join(self.missing)}")
        if self.by_deadline:
            parts.append("closed at its deadline")
        return "; ".join(parts)


def waterfall(facts: RunFacts, cycle: int, now_ms: int) -> list[Bar]:
    """Return the windows of a cycle that were opened. An open one reaches to `now_ms`, or to its deadline when that is
    over.
    """
    began = facts.window("train", cycle).opened_fact
    if began is None:
        return []
    return [bar for window in WINDOWS if (bar := _bar(facts, window, cycle, began.time_unix_ms, now_ms)) is not None]


def _bar(facts: RunFacts, window: str, cycle: int, zero: int, now_ms: int) -> Bar | None:
    opening, closing = facts.window(window, cycle).opened_fact, facts.window(window, cycle).closed_fact
    if opening is None:
        return None
    acts = tuple(_acts(facts, window, cycle, zero))
    end = _end(facts, opening, closing, acts, zero, now_ms)
    acted = {fact.key.id for fact in _facts(facts, window, cycle) if fact.key.kind in _FINISHING}
    closed = facts.window(window, cycle).closed
    return Bar(
        window=window,
        start_ms=opening.time_unix_ms - zero,
        end_ms=end - zero,
        open=closing is None and facts.ended is None,
        by_deadline=closed is not None and closed.cause == cycle_pb2.CLOSE_CAUSE_DEADLINE,
        acts=acts,
        missing=tuple(miner_name(facts, key) for key in opening.message.expected if key not in acted),
    )


def _end(
    facts: RunFacts,
    opening: Fact[cycle_pb2.WindowOpened],
    closing: Fact | None,
    acts: tuple[Act, ...],
    zero: int,
    now_ms: int,
) -> int:
    if closing is not None:
        return closing.time_unix_ms
    if (ended := facts.ended_fact) is not None:
        return ended.time_unix_ms
    limit = opening.message.deadline_unix_ms or now_ms
    latest = max((zero + act.at_ms for act in acts), default=opening.time_unix_ms)
    return max(opening.time_unix_ms, latest, min(now_ms, limit))


def _acts(facts: RunFacts, window: str, cycle: int, zero: int) -> Iterator[Act]:
    for fact in sorted(_facts(facts, window, cycle), key=lambda fact: fact.time_unix_ms):
        who = miner_name(facts, fact.key.id) if fact.key.id else "the aggregator"
        yield Act(who, fact.key.kind, fact.time_unix_ms - zero)


def _facts(facts: RunFacts, window: str, cycle: int) -> Iterator[Fact]:
    closed = facts.window(window, cycle).closed_fact
    for section, kind in _ACTS[window]:
        for fact in facts.all(section, cycle, kind).values():
            # A late one belongs to no window; the miners' table says so.
            if closed is None or fact.time_unix_ms <= closed.time_unix_ms:
                yield fact
