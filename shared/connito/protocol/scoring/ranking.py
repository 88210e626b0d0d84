"""From agreed utilities to ranks, rewards and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

from connito.protocol.scoring import payout
from connito.protocol.scoring.consensus import Consensus
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2


def rank(submissions: Sequence[cycle_pb2.Submission], utilities: Mapping[str, float]) -> list[str]:
    """Miners with utility above zero, best first. Equal utilities: the earlier commitment is ahead."""
    useful = [entry for entry in submissions if utilities.get(entry.miner, 0.0) > 0.0]
    useful.sort(key=lambda entry: (-utilities[entry.miner], entry.commit_sequence, entry.miner))
    return [entry.miner for entry in useful]


def rewards(ranked: int, emission: int, paid_ranks: int, decay: Fraction = payout.HALVING) -> list[int]:
    """Units for ranks 1, 2, …: geometric over the first `paid_ranks`, zero below, summing to `emission` exactly.

    Fractions of a unit go to the largest remainders, then to the better rank. Nobody ranked or paid: all zero, and
    the emission stays unallocated.
    """
    paid = min(ranked, paid_ranks)
    units = payout.apportion(emission, [decay**place for place in range(paid)])
    # Rounding can lift a rank by one unit above a better one when their exact shares are close; order is restored.
    return sorted(units, reverse=True) + [0] * (ranked - paid)


def verdicts(
    submissions: Sequence[cycle_pb2.Submission],
    agreed: Consensus,
    *,
    emission: int,
    paid_ranks: int,
    weights: Mapping[str, float],
    copies: Mapping[str, str] | None = None,
    policy: run_pb2.RewardPolicy | None = None,
) -> tuple[list[cycle_pb2.Verdict], int]:
    """One verdict per submission, in the order of `submissions`, and the units that nobody earned.

    weights: share of the merge by miner; above zero means merged. copies: copy -> original, blamed on the later
    commitment: a copy has no utility, rank or reward, its original keeps its own. policy: how units are shared out, None
    for the rank table. Raises `Invalid` for a payout policy that is not installed here.
    """
    copied = copies or {}
    utilities = {miner: 0.0 if miner in copied else value for miner, value in agreed.utilities.items()}
    ranked = rank(submissions, utilities)
    units = payout.pay([utilities[miner] for miner in ranked], emission, paid_ranks, policy or run_pb2.RewardPolicy())
    found = []
    for entry in submissions:
        verdict = cycle_pb2.Verdict(miner=entry.miner, origin_cycle=entry.origin_cycle)
        if entry.miner in ranked:
            place = ranked.index(entry.miner)
            _fill(verdict, utilities[entry.miner], place + 1, units[place], weights.get(entry.miner, 0.0), paid_ranks)
        else:
            verdict.status = cycle_pb2.VERDICT_STATUS_REJECTED
            verdict.reason, verdict.detail = _refusal(entry.miner, agreed, copied)
        found.append(verdict)
    return found, emission - sum(units)


def _fill(verdict: cycle_pb2.Verdict, utility: float, place: int, reward: int, weight: float, paid_ranks: int) -> None:
    verdict.utility, verdict.rank, verdict.reward, verdict.weight = utility, place, reward, weight
    verdict.status = cycle_pb2.VERDICT_STATUS_MERGED if weight > 0.0 else cycle_pb2.VERDICT_STATUS_SCORED
    if place > paid_ranks:
        verdict.reason = reasons_pb2.REASON_BELOW_CUTOFF
        verdict.detail = f"rank {place}; the first {paid_ranks} are paid"


def _refusal(miner: str, agreed: Consensus, copied: Mapping[str, str]) -> tuple[reasons_pb2.Reason.ValueType, str]:
    if miner in copied:
        return reasons_pb2.REASON_COPY, f"a copy of what {copied[miner][:12]}… committed earlier"
    return agreed.reasons.get(miner, (reasons_pb2.REASON_NO_QUORUM, "no validator scored it"))
