"""Choice of the validators' reports of a cycle that count. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from connito.protocol.assignment import assigned
from connito.protocol.findings import Refusal
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts

# Losses are a few nats per token; a sum of larger claims would not be a number any more.
MAX_UTILITY = 1000


@dataclass(frozen=True)
class Reports:
    """Reports that count, by validator, and why each other one does not. A reason is given for those that do not score
    exactly what the seed assigned."""

    counted: dict[str, cycle_pb2.ScoreReport]
    ignored: dict[str, Refusal]


def read_reports(facts: RunFacts, cycle: int) -> Reports:
    """Sort a cycle's reports: inside the window, by a drawn validator, on the drawn seed and the cycle's state.

    Where the seed assigns submissions, a report also has to score exactly those of its validator: leaving one out, or
    adding one, would choose whom to judge.
    """
    counted: dict[str, cycle_pb2.ScoreReport] = {}
    ignored: dict[str, Refusal] = {}
    duties = assigned(facts, cycle)
    for validator, fact in facts.reports(cycle).items():
        report = fact.message
        late = not facts.window("validate", cycle).inside(fact)
        fault = Finding(kind=cycle_pb2.FINDING_KIND_REPORT_LATE) if late else _fault(facts, cycle, report)
        why = None if fault is None else Refusal(reasons_pb2.REASON_UNSPECIFIED, fault)
        if why is None and duties is not None:
            why = _off_duty({score.miner for score in report.scores}, duties[validator])
        if why is None:
            counted[validator] = report
        else:
            ignored[validator] = why
    return Reports(counted, ignored)


def _off_duty(scored: set[str], duty: frozenset[str]) -> Refusal | None:
    """Return the refusal of a report that scores more or less than its validator's assignment; None if it matches."""
    if added := sorted(scored - duty):
        kind = cycle_pb2.FINDING_KIND_REPORT_NOT_ASSIGNED
        return Refusal(reasons_pb2.REASON_NOT_ASSIGNED, Finding(kind=kind, miners=added))
    if missing := sorted(duty - scored):
        kind = cycle_pb2.FINDING_KIND_REPORT_INCOMPLETE
        return Refusal(reasons_pb2.REASON_INCOMPLETE_REPORT, Finding(kind=kind, miners=missing))
    return None


def _fault(facts: RunFacts, cycle: int, report: cycle_pb2.ScoreReport) -> Finding | None:
    """Return why a report does not count; None when it does."""
    drawn = draw(facts, cycle)
    opened = facts.window("train", cycle).require_opened()
    settled = facts.window("submit", cycle).require_settled()
    artifacts = {submission.miner: submission.artifact.digest for submission in settled.submissions}
    if drawn is None or report.validator not in drawn.validators:
        return Finding(kind=cycle_pb2.FINDING_KIND_REPORT_NOT_DRAWN)
    if report.seed != drawn.seed:
        return Finding(kind=cycle_pb2.FINDING_KIND_REPORT_OTHER_SEED)
    if report.state_digest != opened.state.digest:
        return Finding(kind=cycle_pb2.FINDING_KIND_REPORT_OTHER_STATE)
    if len({score.miner for score in report.scores}) != len(report.scores):
        return Finding(kind=cycle_pb2.FINDING_KIND_REPORT_TWICE)
    if any(artifacts.get(score.miner) != score.artifact_digest for score in report.scores):
        return Finding(kind=cycle_pb2.FINDING_KIND_REPORT_OTHER_ARTIFACT)
    if not all(math.isfinite(score.utility) and score.utility >= 0 for score in report.scores):
        return Finding(kind=cycle_pb2.FINDING_KIND_REPORT_NO_UTILITY)
    if any(score.utility > MAX_UTILITY for score in report.scores):
        return Finding(kind=cycle_pb2.FINDING_KIND_REPORT_HIGH_UTILITY, limit=MAX_UTILITY)
    return None


def draw(facts: RunFacts, cycle: int) -> cycle_pb2.SeedDrawn | None:
    """Return the cycle's draw, if it was made inside the validate window."""
    window = facts.window("validate", cycle)
    fact = window.drawn_fact
    return None if fact is None or not window.inside(fact) else fact.message
