"""Data of the pages, as pure projections of a run's facts; nothing is shown that is not in a fact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from connito.protocol.quorum import Present, pause
from connito.protocol.rules import Stake
from connito.render import formats
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views import words
from connito.views.live import phase
from connito.views.run_report import outcome, submission_rows
from connito.views.standings import rating_text
from connito.wire.facts import RunFacts
from connito.wire.window import Window

# A window may close this much after its deadline before somebody should be told.
OVERDUE_MS = 5000


@dataclass(frozen=True)
class Head:
    """The top of a run's pages. `deadline_unix_ms` is 0 where nothing is waited for; `stale` says what is overdue."""

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


@dataclass(frozen=True)
class ExpertRow:
    """An expert in the library, with what its run says about it."""

    expert_id: str
    run: str
    domain: str
    base: str
    base_digest: str
    digest: str
    size: str
    record: ArtifactRef
    deposited_unix_ms: int
    curves: tuple[Curve, ...]

    @property
    def target(self) -> Curve | None:
        """Return the loss curve on the expert's own domain."""
        return next((curve for curve in self.curves if curve.target), None)

    def curve(self, domain: str) -> Curve | None:
        """Return the loss curve on a domain, if its run measured it."""
        return next((curve for curve in self.curves if curve.domain == domain), None)


def run_rows(runs: Mapping[str, RunFacts], now_ms: int, stake: Stake) -> list[RunRow]:
    """Return every run that was created, the newest first."""
    rows = [_run_row(facts, now_ms, stake) for facts in runs.values() if facts.spec is not None]
    return sorted(rows, key=lambda row: (-row.created_unix_ms, row.head.run))


def head(facts: RunFacts, now_ms: int, stake: Stake) -> Head:
    """Return the state of a run. Raises `AssertionError` for a run that was not created."""
    spec, ending = facts.require_spec(), outcome(facts)
    window = facts.open_window if facts.ended is None else None
    deadline, here = 0 if window is None else window.deadline_unix_ms, pause(facts, now_ms, stake)
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
        stale=_overdue(window, deadline, now_ms, here),
        cycles=tuple(facts.cycles()),
        planned=spec.cycles,
        miners=len(facts.miners),
        validators=len(facts.validators),
    )


def miner_rows(facts: RunFacts, cycle: int) -> list[MinerRow]:
    """Return the miners that were expected or acted in a cycle: best rank first, then those refused."""
    totals, scored = rewards(facts), judged(facts, cycle)
    rows = []
    for row in submission_rows(facts, cycle):
        verdict = scored.get(row["key"])
        rows.append(
            MinerRow(
                key=row["key"],
                name=row["miner"],
                status=row["status"],
                reason=words.clause(row["reason"]),
                detail=row["detail"],
                rank=row["rank"],
                utility=None if verdict is None else verdict.utility,
                reward=None if verdict is None else verdict.reward,
                total_reward=totals.get(row["key"], 0),
                origin_cycle=row["origin_cycle"] if row["origin_cycle"] not in (0, cycle) else 0,
                scored=verdict is not None or row["key"] in _measured(facts, cycle),
                rating=rating_text(row["rating"]),
            )
        )
    return rows


def judged(facts: RunFacts, cycle: int) -> dict[str, cycle_pb2.Verdict]:
    """Return the verdicts of a cycle by miner; empty until they are published."""
    scored = facts.scored(cycle)
    return {} if scored is None else {verdict.miner: verdict for verdict in scored.verdicts}


def rewards(facts: RunFacts) -> dict[str, int]:
    """Return units of the emission that each miner was given in the run so far."""
    totals: dict[str, int] = {}
    for cycle in facts.cycles():
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


def library_rows(runs: Mapping[str, RunFacts], query: str = "") -> list[ExpertRow]:
    """Return experts whose id, run, domain or base holds every word of `query`, the newest first."""
    rows = [row for facts in runs.values() for row in _expert_rows(facts)]
    return sorted(_matching(rows, query.lower().split()), key=lambda row: (-row.deposited_unix_ms, row.expert_id))


def comparison(rows: Iterable[ExpertRow]) -> list[str]:
    """Return the domains that at least one of these experts was measured on, targets first."""
    found = [curve for row in rows for curve in row.curves]
    return list(
        dict.fromkeys(curve.domain for curve in sorted(found, key=lambda curve: (not curve.target, curve.domain)))
    )


def _matching(rows: Iterable[ExpertRow], terms: list[str]) -> Iterable[ExpertRow]:
    for row in rows:
        text = " ".join((row.expert_id, row.run, row.domain, row.base, row.digest)).lower()
        if all(term in text for term in terms):
            yield row


def _run_row(facts: RunFacts, now_ms: int, stake: Stake) -> RunRow:
    created = facts.created_fact
    assert created is not None
    target = next((curve.points for curve in curves(facts) if curve.target), None)
    first, last = (None, None) if target is None else (target[0][1], target[-1][1])
    return RunRow(head(facts, now_ms, stake), created.time_unix_ms, first, last)


def _overdue(window: Window | None, deadline_ms: int, now_ms: int, here: Present | None) -> str:
    if window is None or not deadline_ms or now_ms <= deadline_ms + OVERDUE_MS or here is not None:
        return ""
    return (
        f"The {window.name} window should have closed, and nothing was heard since. The coordinator may be down: its log and "
        "`connito doctor` say more."
    )


def _expert_rows(facts: RunFacts) -> Iterable[ExpertRow]:
    for fact in facts.deposits.values():
        message = fact.message
        yield ExpertRow(
            expert_id=message.expert_id,
            run=fact.run,
            domain=message.domain,
            base="" if facts.spec is None else facts.spec.base.name,
            base_digest=message.base_digest,
            digest=message.expert.digest,
            size=formats.size(message.expert.size),
            record=message.record,
            deposited_unix_ms=fact.time_unix_ms,
            curves=tuple(curves(facts)),
        )


def _measured(facts: RunFacts, cycle: int) -> set[str]:
    found: set[str] = set()
    for fact in facts.reports(cycle).values():
        found.update(score.miner for score in fact.message.scores)
    return found
