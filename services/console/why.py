"""Explanation of a submission's score: each validator's measurement and the result."""

from __future__ import annotations

from dataclasses import dataclass

from connito.render import formats
from connito.v1 import cycle_pb2
from connito.views import words
from connito.views.run_report import miner_name
from connito.views.sentences import detail_of
from connito.views.standings import ValidatorRow, rating_text, ratings, validator_rows
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts

from .views import judged


@dataclass(frozen=True)
class Measurement:
    """One validator's measurement, and its standing in this cycle, None until that is published. Effect and interval are in
    nats per token of the target hold-out, positive is better; the change on general text is worse where it is positive."""

    validator: str
    score: cycle_pb2.SubmissionScore
    standing: ValidatorRow | None = None


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
    verdict: cycle_pb2.Verdict | None
    rating: str
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
    return Why(
        cycle=cycle,
        miner=miner,
        name=miner_name(facts, miner),
        verdict=verdict,
        rating=rating_text(ratings(facts, cycle).get(miner)),
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
    standings = {row.validator: row for row in validator_rows(facts, cycle)}
    for validator, fact in facts.reports(cycle).items():
        for score in fact.message.scores:
            if score.miner == miner:
                spoke.add(validator)
                found.append(Measurement(miner_name(facts, validator), score, standings.get(validator)))
    drawn = facts.drawn(cycle)
    expected = () if drawn is None else (*drawn.validators, *drawn.omitted)
    return found, [miner_name(facts, key) for key in expected if key not in spoke]


def _digest(facts: RunFacts, cycle: int, miner: str) -> str:
    settled = facts.window("submit", cycle).submissions
    return next((entry.artifact.digest for entry in settled if entry.miner == miner), "")


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
        return (
            f"trained {formats.count(message.steps, 'step')} over "
            f"{formats.count(message.tokens, 'token')} in {formats.duration(message.seconds)}"
        )
    if isinstance(message, cycle_pb2.Commitment):
        return f"committed to {message.digest.hex()[:16]}…"
    if isinstance(message, cycle_pb2.Reveal):
        return f"revealed an artifact of {formats.size(message.artifact.size)}"
    if isinstance(message, cycle_pb2.Refused):
        return f"refused: {words.in_words(message.reason)} ({detail_of(message)})"
    return "the commitment was accepted" if fact.key.section == "commit" else "the reveal was accepted"
