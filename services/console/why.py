"""Explanation of a submission's score: each validator's measurement and the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from connito.render import formats
from connito.v1 import cycle_pb2
from connito.views import words
from connito.views.sentences import detail_of
from connito.views.standings import rating_text, ratings, validator_rows
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts

from .views import judged, name, reason_pair


@dataclass(frozen=True)
class Measurement:
    """One validator's measurement. Effect and interval in nats per token of the target hold-out, positive is better;
    `general` is the change on general text, positive is worse. `distance` is the validator's largest distance from
    consensus in this cycle, None until that is published; `weight` is what its vote weighed, `trust` what the cycle left of
    it, and `standing` says why it lost some."""

    validator: str
    effect: float
    low: float
    high: float
    general: float
    general_high: float
    utility: float
    code: str
    reason: str
    detail: str
    distance: float | None
    weight: float | None = None
    agreement: float | None = None
    trust: float | None = None
    standing: str = ""


@dataclass(frozen=True)
class Step:
    """A message of or about the miner in this cycle."""

    time_unix_ms: int
    text: str


@dataclass(frozen=True)
class Why:
    """The log's content on one miner in one cycle."""

    cycle: int
    miner: str
    name: str
    status: str
    code: str
    reason: str
    detail: str
    utility: float | None
    rank: int
    reward: int | None
    withheld: int
    rating: str
    weight: float | None
    margin: float
    confidence: float
    digest: str
    measurements: tuple[Measurement, ...]
    silent: tuple[str, ...]
    steps: tuple[Step, ...]


def why(facts: RunFacts, cycle: int, miner: str) -> Why | None:
    """Return the explanation of one score; None where the log holds nothing on this miner in this cycle."""
    spec, verdict, steps = facts.spec, judged(facts, cycle).get(miner), _steps(facts, cycle, miner)
    found, silent = _measurements(facts, cycle, miner)
    if spec is None or (verdict is None and not steps and not found):
        return None
    code, reason = ("", "") if verdict is None else reason_pair(verdict.reason)
    return Why(
        cycle=cycle,
        miner=miner,
        name=name(facts, miner),
        status="not judged yet" if verdict is None else words.STATUS.get(verdict.status, "rejected"),
        code=code,
        reason=reason,
        detail="" if verdict is None else detail_of(verdict),
        utility=None if verdict is None else verdict.utility,
        rank=0 if verdict is None else verdict.rank,
        reward=None if verdict is None else verdict.reward,
        withheld=0 if verdict is None else verdict.withheld,
        rating=rating_text(ratings(facts, cycle).get(miner)),
        weight=None if verdict is None else verdict.weight,
        margin=spec.scoring.retention_margin,
        confidence=spec.scoring.confidence,
        digest=_digest(facts, cycle, miner),
        measurements=tuple(found),
        silent=tuple(silent),
        steps=tuple(steps),
    )


def _measurements(facts: RunFacts, cycle: int, miner: str) -> tuple[list[Measurement], list[str]]:
    """Return the validators' measurements, and the drawn validators that did not report on this miner."""
    found, spoke = [], set()
    distances = _distances(facts, cycle)
    standings = {row["validator"]: row for row in validator_rows(facts, cycle)}
    for validator, fact in facts.reports(cycle).items():
        for score in fact.message.scores:
            if score.miner == miner:
                spoke.add(validator)
                measured = _measurement(facts, validator, score, distances.get(validator))
                found.append(_weighed(measured, standings.get(validator)))
    drawn = facts.drawn(cycle)
    expected = () if drawn is None else (*drawn.validators, *drawn.omitted)
    return found, [name(facts, key) for key in expected if key not in spoke]


def _measurement(
    facts: RunFacts, validator: str, score: cycle_pb2.SubmissionScore, distance: float | None
) -> Measurement:
    code, reason = reason_pair(score.reason)
    return Measurement(
        validator=name(facts, validator),
        effect=score.effect,
        low=score.effect_low,
        high=score.effect_high,
        general=score.general_change,
        general_high=score.general_change_high,
        utility=score.utility,
        code=code,
        reason=reason,
        detail=detail_of(score),
        distance=distance,
    )


def _weighed(measured: Measurement, row: dict[str, Any] | None) -> Measurement:
    """Add the cycle's result for the validator to a measurement."""
    if row is None:
        return measured
    told = words.REASONS.get(row["reason"], row["reason"])
    standing = f"{told} ({row['detail']})" if row["detail"] else told
    return replace(measured, weight=row["weight"], agreement=row["agreement"], trust=row["trust"], standing=standing)


def _distances(facts: RunFacts, cycle: int) -> dict[str, float]:
    scored = facts.scored(cycle)
    standings = () if scored is None else scored.validators
    return {standing.validator: standing.deviation for standing in standings if standing.reported}


def _digest(facts: RunFacts, cycle: int, miner: str) -> str:
    settled = facts.window("submit", cycle).settled
    for submission in () if settled is None else settled.submissions:
        if submission.miner == miner:
            return submission.artifact.digest
    return ""


def _steps(facts: RunFacts, cycle: int, miner: str) -> list[Step]:
    said = [
        fact
        for kind in ("trained", "commitment", "reveal")
        if (fact := facts.fact("ingress", cycle, kind, miner)) is not None
    ]
    answers = [
        fact
        for window in ("commit", "submit")
        for kind in ("accepted", "refused")
        for fact in facts.all(window, cycle, kind).values()
        if fact.key.id.partition("-")[0] == miner
    ]
    ordered = sorted((*said, *answers), key=lambda fact: (fact.time_unix_ms, fact.sequence))
    return [Step(fact.time_unix_ms, _sentence(fact)) for fact in ordered]


def _sentence(fact: Fact) -> str:
    message = fact.message
    if isinstance(message, cycle_pb2.TrainingFinished):
        return f"trained {message.steps} steps over {message.tokens} tokens in {formats.duration(message.seconds)}"
    if isinstance(message, cycle_pb2.Commitment):
        return f"committed to {message.digest.hex()[:16]}…"
    if isinstance(message, cycle_pb2.Reveal):
        return f"revealed an artifact of {formats.size(message.artifact.size)}"
    if isinstance(message, cycle_pb2.Refused):
        return f"refused: {words.in_words(message.reason)} ({detail_of(message)})"
    return "the commitment was accepted" if fact.key.section == "commit" else "the reveal was accepted"
