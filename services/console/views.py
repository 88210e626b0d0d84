"""Data of the pages, as pure projections of a run's facts; nothing is shown that is not in a fact."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from connito.protocol import rules
from connito.protocol.quorum import overdue, pause
from connito.protocol.rules import Stake
from connito.v1 import cycle_pb2
from connito.views import words
from connito.views.live import phase
from connito.views.run_report import miner_name, outcome, submission_rows
from connito.views.standings import rating_text
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.window import Window

# What `short_key` makes of a miner's key.
SHORT_KEY = re.compile(r"\bU[A-Z2-7]{11}…")


@dataclass(frozen=True)
class Head:
    """The top of a run's pages. `deadline_unix_ms` is 0 where nothing is waited for; `stale` says what is overdue.

    `left_seconds`: what the cycles to come would take if each took as long as those that are over; 0 where none is.
    """

    run: str
    domain: str
    base: str
    status: str
    phase: str
    reason: str
    detail: str
    window: str
    deadline_unix_ms: int
    last_unix_ms: int
    stale: str
    cycles: tuple[int, ...]
    planned: int
    miners: int
    validators: int
    left_seconds: float = 0.0


@dataclass(frozen=True)
class RunRow:
    """A line of the list of runs. Losses are nats per token, None where none was published."""

    head: Head
    created_unix_ms: int
    first_loss: float | None
    last_loss: float | None


@dataclass(frozen=True)
class MinerRow:
    """A miner in one cycle. `rank` 0 is unranked; `utility` is None unless it was judged (nats per token)."""

    key: str
    name: str
    status: str
    reason: str
    detail: str
    rank: int
    utility: float | None
    reward: int | None
    total_reward: int
    origin_cycle: int
    scored: bool
    rating: str = ""


@dataclass(frozen=True)
class Curve:
    """A domain's loss on the report subset by version: (version, nats per token)."""

    domain: str
    target: bool
    points: tuple[tuple[int, float], ...]

    @property
    def change(self) -> float:
        """Return the change from the first version to the last; negative is better."""
        return self.points[-1][1] - self.points[0][1]


def run_rows(runs: Mapping[str, RunFacts], now_ms: int, stake: Stake) -> list[RunRow]:
    """Return every run that was created, the newest first."""
    rows = [_run_row(facts, now_ms, stake) for facts in runs.values() if facts.spec is not None]
    return sorted(rows, key=lambda row: (-row.created_unix_ms, row.head.run))


def head(facts: RunFacts, now_ms: int, stake: Stake) -> Head:
    """Return the state of a run. Raises `AssertionError` for a run that was not created."""
    spec, ending = facts.require_spec(), outcome(facts)
    window = facts.open_window if facts.ended is None else None
    deadline, here = 0 if window is None else rules.due_ms(facts, window), pause(facts, now_ms, stake)
    return Head(
        run=facts.run,
        domain=spec.domain,
        base=spec.base.name,
        status=ending["status"],
        phase=phase(facts, here=here),
        reason=words.clause(ending["reason"]),
        detail=ending["detail"],
        window="" if window is None else window.name,
        deadline_unix_ms=deadline,
        last_unix_ms=max(fact.time_unix_ms for fact in facts.facts.values()),
        stale=_stale(overdue(facts, now_ms, stake)),
        cycles=tuple(facts.cycles()),
        planned=spec.cycles,
        miners=len(facts.miners),
        validators=len(facts.validators),
        left_seconds=0.0 if facts.ended is not None else _left(facts, now_ms),
    )


def _left(facts: RunFacts, now_ms: int) -> float:
    """Return the seconds until the last planned cycle is over, by the middle one of those that are."""
    opened = [facts.window("train", cycle).opened_fact for cycle in facts.cycles()]
    starts = [fact.time_unix_ms for fact in opened if fact is not None]
    if len(starts) < 2:
        return 0.0
    took = median(later - earlier for earlier, later in pairwise(starts))
    return max(0.0, starts[-1] + took * (1 + facts.require_spec().cycles - facts.cycle) - now_ms) / 1000


def miner_rows(facts: RunFacts, cycle: int) -> list[MinerRow]:
    """Return the miners that were expected or acted in a cycle: best rank first, then those refused."""
    totals, scored, measured = rewards(facts, cycle), judged(facts, cycle), _measured(facts, cycle)
    names = {short_key(key): miner_name(facts, key) for key in facts.miners}
    rows = []
    for row in submission_rows(facts, cycle):
        verdict = scored.get(row["key"])
        rows.append(
            MinerRow(
                key=row["key"],
                name=row["miner"],
                status=row["status"],
                reason=words.clause(row["reason"]),
                detail=named(names, row["detail"]),
                rank=row["rank"],
                utility=None if verdict is None else verdict.utility,
                reward=None if verdict is None else verdict.reward,
                total_reward=totals.get(row["key"], 0),
                origin_cycle=row["origin_cycle"] if row["origin_cycle"] not in (0, cycle) else 0,
                scored=verdict is not None or row["key"] in measured,
                rating=rating_text(row["rating"]),
            )
        )
    return rows


def named(names: Mapping[str, str], text: str) -> str:
    """Return a sentence with names in place of the beginnings of keys (`short_key`) that have one."""
    return SHORT_KEY.sub(lambda found: names.get(found[0], found[0]), text)


def judged(facts: RunFacts, cycle: int) -> dict[str, cycle_pb2.Verdict]:
    """Return the verdicts of a cycle by miner; empty until they are published."""
    scored = facts.scored(cycle)
    return {} if scored is None else {verdict.miner: verdict for verdict in scored.verdicts}


def rewards(facts: RunFacts, until: int) -> dict[str, int]:
    """Return units of the emission that each miner was given in the run's cycles up to one."""
    totals: dict[str, int] = {}
    for cycle in (number for number in facts.cycles() if number <= until):
        for miner, verdict in judged(facts, cycle).items():
            totals[miner] = totals.get(miner, 0) + verdict.reward
    return totals


def curves(facts: RunFacts) -> list[Curve]:
    """Return loss by domain, the target first. A cycle's `before` is drawn only at the start and after a gap."""
    points: dict[str, list[tuple[int, float]]] = {}
    target = ""
    for cycle in facts.cycles():
        version = facts.version(cycle)
        for index, loss in enumerate(version.losses if version is not None else ()):
            assert version is not None
            target = target or (loss.domain if index == 0 else "")
            line = points.setdefault(loss.domain, [(version.parent, loss.before)])
            line.append((version.version, loss.after))
    return [Curve(domain, domain == target, tuple(dict(line).items())) for domain, line in points.items()]


def _run_row(facts: RunFacts, now_ms: int, stake: Stake) -> RunRow:
    created = facts.created_fact
    assert created is not None
    target = next((curve.points for curve in curves(facts) if curve.target), None)
    first, last = (None, None) if target is None else (target[0][1], target[-1][1])
    return RunRow(head(facts, now_ms, stake), created.time_unix_ms, first, last)


def _stale(window: Window | None) -> str:
    return (
        ""
        if window is None
        else (
            f"The {window.name} window should have closed, and nothing was heard since. The coordinator may be down: its log and "
            "`connito doctor` say more."
        )
    )


def _measured(facts: RunFacts, cycle: int) -> set[str]:
    found: set[str] = set()
    for fact in facts.reports(cycle).values():
        found.update(score.miner for score in fact.message.scores)
    return found
