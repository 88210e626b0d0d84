"""Stake-weighted consensus of validators that clips a minority (Yuma).

W̄_j = max{w : Σ_i s_i·1[W_ij ≥ w] ≥ κ·Σ_i s_i}, κ = ½: the largest utility that validators with at least half of the
stake would all grant. Whatever a smaller coalition claims above that is cut off, and it cannot push it below what the
others grant. With two validators of equal stake, half is one of them: use three where validators may lie.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from connito.protocol.findings import Refusal, finding_of
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding


@dataclass(frozen=True)
class Consensus:
    """Agreed utilities by miner in nats per token, why one is zero, who deviated, and the weight of each validator's
    vote.

    `claims` are what each validator granted the submissions that it was to score, and `agreed` what consensus granted
    them, whatever became of them afterwards. `judged` is False where too few validators reported to judge anyone.
    """

    utilities: dict[str, float]
    reasons: dict[str, Refusal]
    standings: list[cycle_pb2.ValidatorStanding] = field(default_factory=list)
    stakes: dict[str, float] = field(default_factory=dict)
    claims: dict[str, dict[str, float]] = field(default_factory=dict)
    agreed: dict[str, float] = field(default_factory=dict)
    judged: bool = True


def consensus(
    reports: Iterable[cycle_pb2.ScoreReport],
    stakes: Mapping[str, float] | None = None,
    *,
    kappa: float = 0.5,
    submissions: Sequence[cycle_pb2.Submission] | None = None,
    expected: Iterable[str] = (),
    seed: bytes | None = None,
    state_digest: str | None = None,
    assigned: Mapping[str, Container[str]] | None = None,
) -> Consensus:
    """Combine the reports of a cycle.

    stakes: weight by validator; None gives everybody 1, a validator that is not in it counts nothing. submissions: the
    settled ones; scores of anything else, or of another artifact, are ignored, and one that nobody scored is zero. A
    report for another `seed` or `state_digest` counts as not given. Of a miner scored twice in a report, the first
    stands. Utilities that are negative or no numbers count as zero. assigned: the miners that each validator was to score,
    None for all of them; only those assigned to a miner are asked about it, and one that leaves it out has zero there.
    """
    valid = {
        report.validator: report
        for report in sorted(reports, key=lambda report: report.validator)
        if (seed is None or report.seed == seed) and (state_digest is None or report.state_digest == state_digest)
    }
    weight = {validator: 1.0 if stakes is None else float(stakes.get(validator, 0.0)) for validator in valid}
    scores = {validator: _by_miner(report, submissions) for validator, report in valid.items()}

    def asked(validator: str, miner: str) -> bool:
        return assigned is None or miner in assigned.get(validator, ())

    miners = sorted(
        {submission.miner for submission in submissions}
        if submissions is not None
        else {miner for given in scores.values() for miner in given}
    )
    utilities: dict[str, float] = {}
    reasons: dict[str, Refusal] = {}
    for miner in miners:
        heard = {validator: given for validator, given in scores.items() if asked(validator, miner)}
        utilities[miner] = clipped(
            {validator: _claim(given.get(miner)) for validator, given in heard.items()}, weight, kappa
        )
        if utilities[miner] == 0.0:
            reasons[miner] = _majority_reason(miner, heard, weight)
    everyone = sorted({*expected, *valid})
    standings = [
        _standing(name, scores.get(name), {miner: u for miner, u in utilities.items() if asked(name, miner)})
        for name in everyone
    ]
    claims = {
        name: {miner: _claim(given.get(miner)) for miner in miners if asked(name, miner)}
        for name, given in scores.items()
    }
    return Consensus(utilities, reasons, standings, weight, claims, dict(utilities))


def clipped(claims: Mapping[str, float], stakes: Mapping[str, float], kappa: float) -> float:
    """Return w̄ of one submission from the utilities that validators claim. Zero without stake."""
    total = math.fsum(stakes[validator] for validator in claims)
    if total <= 0.0:
        return 0.0
    for level in sorted(set(claims.values()), reverse=True):
        support = math.fsum(stakes[validator] for validator, claim in claims.items() if claim >= level)
        if support >= kappa * total:
            return level
    return 0.0


def _by_miner(
    report: cycle_pb2.ScoreReport, submissions: Sequence[cycle_pb2.Submission] | None
) -> dict[str, cycle_pb2.SubmissionScore]:
    settled = None if submissions is None else {(entry.miner, entry.artifact.digest) for entry in submissions}
    found: dict[str, cycle_pb2.SubmissionScore] = {}
    for score in report.scores:
        if settled is None or (score.miner, score.artifact_digest) in settled:
            found.setdefault(score.miner, score)
    return found


def _claim(score: cycle_pb2.SubmissionScore | None) -> float:
    if score is None or not math.isfinite(score.utility):
        return 0.0
    return max(0.0, score.utility)


def _majority_reason(
    miner: str, scores: Mapping[str, Mapping[str, cycle_pb2.SubmissionScore]], stakes: Mapping[str, float]
) -> Refusal:
    """Return the reason with most stake behind it, as found by the validator with most stake that gave it."""
    given: dict[reasons_pb2.Reason.ValueType, list[tuple[float, str]]] = {}
    for validator, by_miner in scores.items():
        score = by_miner.get(miner)
        if score is not None and _claim(score) == 0.0 and score.reason != reasons_pb2.REASON_UNSPECIFIED:
            given.setdefault(score.reason, []).append((-stakes[validator], validator))
    if not given:
        return Refusal(reasons_pb2.REASON_NO_QUORUM, Finding(kind=cycle_pb2.FINDING_KIND_NO_MAJORITY))
    # Entries are (−stake, validator): the smallest sum has most stake, the smallest entry is the heaviest voice.
    reason = min(given, key=lambda reason: (math.fsum(entry[0] for entry in given[reason]), reason))
    return Refusal(reason, finding_of(scores[min(given[reason])[1]][miner]))


def _standing(
    validator: str, scores: Mapping[str, cycle_pb2.SubmissionScore] | None, utilities: Mapping[str, float]
) -> cycle_pb2.ValidatorStanding:
    if scores is None:
        return cycle_pb2.ValidatorStanding(validator=validator, reported=False)
    distances = [abs(_claim(scores.get(miner)) - utility) for miner, utility in utilities.items()]
    return cycle_pb2.ValidatorStanding(validator=validator, reported=True, deviation=max(distances, default=0.0))
