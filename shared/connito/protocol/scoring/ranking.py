"""From agreed utilities to ranks, rewards and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from connito.protocol.findings import Refusal, Refusals
from connito.protocol.scoring import payout
from connito.protocol.scoring.consensus import Consensus
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.cycle_pb2 import Finding

_UNSCORED = Refusal(reasons_pb2.REASON_NO_QUORUM, Finding(kind=cycle_pb2.FINDING_KIND_NO_MAJORITY))


def rank(submissions: Sequence[cycle_pb2.Submission], utilities: Mapping[str, float]) -> list[str]:
    """Return miners with utility above zero, best first. Equal utilities: the earlier commitment is ahead."""
    useful = [entry for entry in submissions if utilities.get(entry.miner, 0.0) > 0.0]
    useful.sort(key=lambda entry: (-utilities[entry.miner], entry.commit_sequence, entry.miner))
    return [entry.miner for entry in useful]


def verdicts(
    submissions: Sequence[cycle_pb2.Submission],
    agreed: Consensus,
    *,
    emission: int,
    paid_ranks: int,
    weights: Mapping[str, float],
    copies: Refusals | None = None,
    policy: run_pb2.RewardPolicy | None = None,
) -> tuple[list[cycle_pb2.Verdict], int]:
    """Return one verdict per submission, in the order of `submissions`, and the units that nobody earned.

    weights: share of the merge by miner; above zero means merged. copies: blamed on the later
    commitment: a copy has no utility, rank or reward, its original keeps its own. policy: how units are shared out, None
    for the rank table. Raises `Invalid` for a payout policy that is not installed here.
    """
    copied = copies or {}
    utilities = {miner: 0.0 if miner in copied else value for miner, value in agreed.utilities.items()}
    ranked = rank(submissions, utilities)
    places = {miner: place for place, miner in enumerate(ranked)}
    units = payout.pay([utilities[miner] for miner in ranked], emission, paid_ranks, policy or run_pb2.RewardPolicy())
    found = []
    for entry in submissions:
        verdict = cycle_pb2.Verdict(miner=entry.miner, origin_cycle=entry.origin_cycle)
        place = places.get(entry.miner)
        if place is not None:
            _fill(verdict, utilities[entry.miner], place + 1, units[place], weights.get(entry.miner, 0.0), paid_ranks)
        else:
            verdict.status = cycle_pb2.VERDICT_STATUS_REJECTED
            verdict.reason, finding = copied.get(entry.miner) or agreed.reasons.get(entry.miner, _UNSCORED)
            verdict.finding.CopyFrom(finding)
        found.append(verdict)
    return found, emission - sum(units)


def _fill(verdict: cycle_pb2.Verdict, utility: float, place: int, reward: int, weight: float, paid_ranks: int) -> None:
    verdict.utility, verdict.rank, verdict.reward, verdict.weight = utility, place, reward, weight
    verdict.status = cycle_pb2.VERDICT_STATUS_MERGED if weight > 0.0 else cycle_pb2.VERDICT_STATUS_SCORED
    if place > paid_ranks:
        verdict.reason = reasons_pb2.REASON_BELOW_CUTOFF
        verdict.finding.CopyFrom(Finding(kind=cycle_pb2.FINDING_KIND_BELOW_CUTOFF, rank=place, limit=paid_ranks))
