"""Which of the validators' reports of a cycle count, and whether they are enough. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from connito.protocol.assignment import assigned
from connito.protocol.scoring.trust import votes
from connito.v1 import cycle_pb2, reasons_pb2
from connito.wire.facts import RunFacts

# Losses are a few nats per token; a sum of larger claims would not be a number any more.
MAX_UTILITY = 1000.0


@dataclass(frozen=True)
class Reports:
    """Reports that count, by validator, and why each other one does not.

    `misassigned` are those of the ignored that do not score exactly what the seed assigned, with the reason.
    """

    counted: dict[str, cycle_pb2.ScoreReport]
    ignored: dict[str, str]
    misassigned: dict[str, reasons_pb2.Reason.ValueType] = field(default_factory=dict)


def read_reports(facts: RunFacts, cycle: int) -> Reports:
    """Sort a cycle's reports: inside the window, by a drawn validator, on the drawn seed and the cycle's state.

    Where the seed assigns submissions, a report also has to score exactly those of its validator: leaving one out, or
    adding one, would choose whom to judge.
    """
    counted: dict[str, cycle_pb2.ScoreReport] = {}
    ignored: dict[str, str] = {}
    misassigned: dict[str, reasons_pb2.Reason.ValueType] = {}
    duties = assigned(facts, cycle)
    for validator, fact in facts.reports(cycle).items():
        report = fact.message
        why = "late" if not facts.window("validate", cycle).inside(fact) else _fault(facts, cycle, report)
        reason = reasons_pb2.REASON_UNSPECIFIED
        if not why and duties is not None:
            reason, why = _off_duty({score.miner for score in report.scores}, duties[validator])
        if why:
            ignored[validator] = why
        else:
            counted[validator] = report
        if reason:
            misassigned[validator] = reason
    return Reports(counted, ignored, misassigned)


def _off_duty(scored: set[str], duty: frozenset[str]) -> tuple[reasons_pb2.Reason.ValueType, str]:
    """What a report scores beyond its validator's assignment, or leaves out of it; no reason when neither."""
    if added := sorted(scored - duty):
        return reasons_pb2.REASON_NOT_ASSIGNED, f"scores {_names(added)}, not assigned to it"
    if missing := sorted(duty - scored):
        return reasons_pb2.REASON_INCOMPLETE_REPORT, f"leaves out {_names(missing)}, assigned to it"
    return reasons_pb2.REASON_UNSPECIFIED, ""


def _names(miners: list[str]) -> str:
    return ", ".join(f"{miner[:12]}…" for miner in miners)


def _fault(facts: RunFacts, cycle: int, report: cycle_pb2.ScoreReport) -> str:
    """Why a report does not count; empty when it does."""
    drawn = draw(facts, cycle)
    opened = facts.window("train", cycle).opened
    settled = facts.window("submit", cycle).settled
    assert opened is not None
    assert settled is not None
    artifacts = {submission.miner: submission.artifact.digest for submission in settled.submissions}
    if drawn is None or report.validator not in drawn.validators:
        return "not in the draw"
    if report.seed != drawn.seed:
        return "scored another seed than the one drawn"
    if report.state_digest != opened.state.digest:
        return "scored against another state than the cycle's"
    if len({score.miner for score in report.scores}) != len(report.scores):
        return "scores a miner twice"
    if any(artifacts.get(score.miner) != score.artifact_digest for score in report.scores):
        return "scores an artifact that was not submitted"
    if not all(math.isfinite(score.utility) and score.utility >= 0 for score in report.scores):
        return "holds a utility that is not a finite number of at least 0"
    if any(score.utility > MAX_UTILITY for score in report.scores):
        return f"holds a utility above {MAX_UTILITY:g} nats per token"
    return ""


def quorum_fault(facts: RunFacts, cycle: int, reports: Reports, stake: Callable[[str], float]) -> str:
    """Why the reports are too few to judge anyone; empty when they suffice.

    The draw had its quorum of validators; of the weight of their votes, more than half must have reported. A validator that fell
    silent after its reveal then costs nobody the cycle, and a lying minority is not made a majority by it. Where the
    seed assigns submissions, one whose assigned validators mostly fell silent is told so in its verdict.
    """
    drawn = draw(facts, cycle)
    if drawn is None:
        return "too few validators revealed their seed, so nothing was drawn to score on"
    weight = votes(facts, cycle, stake)
    total = sum(weight(validator) for validator in drawn.validators)
    reported = sum(weight(validator) for validator in reports.counted)
    if reported <= total / 2:
        return f"validators with {reported:g} of {total:g} stake reported in time; more than half is needed"
    return ""


def draw(facts: RunFacts, cycle: int) -> cycle_pb2.SeedDrawn | None:
    """The cycle's draw, if it was made inside the validate window."""
    fact = facts.drawn_fact(cycle)
    if fact is None or not facts.window("validate", cycle).inside(fact):
        return None
    return fact.message
