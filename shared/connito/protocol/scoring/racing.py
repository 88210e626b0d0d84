"""Schedule of interim looks at a submission's losses and their confidence: racing within the evaluation budget.

Held-out sequences are evaluated in the order in which the seed draws them. After `minimum_sequences` of the target,
and every time that number has doubled, the paired interval is looked at; what is decided then is not evaluated further.
Looking often would find chance effects often, so each look spends a part of the error α = 1 − confidence: look j, at
the share t_j of the budget, gets α·(t_j² − t_{j−1}²), the power family of Kim and DeMets (Biometrika 74, 1987) over the
spending functions of Lan and DeMets (Biometrika 70, 1983). The parts sum to α, so by the union bound the race errs at
most as often as a single interval at the policy's confidence would, however the looks depend on one another. Early
looks have to be much surer than late ones: what stops early has an effect of several standard errors.
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.v1 import run_pb2


@dataclass(frozen=True)
class InterimLook:
    """So many sequences, of the target and of each general domain, and the confidence that a decision needs."""

    target: int
    general: int
    confidence: float
    last: bool


def looks(policy: run_pb2.ScorePolicy) -> list[InterimLook]:
    """Return the looks of a policy, the last one at its whole budget. Just that one without racing."""
    budget, size = policy.target_sequences, policy.minimum_sequences
    found: list[InterimLook] = []
    spent = 0.0
    while 0 < size < budget:
        share = (size / budget) ** 2
        # Two sequences are the fewest that have an interval.
        general = min(policy.general_sequences, max(2, -(-policy.general_sequences * size // budget)))
        found.append(InterimLook(size, general, 1.0 - (1.0 - policy.confidence) * (share - spent), last=False))
        spent, size = share, 2 * size
    confidence = 1.0 - (1.0 - policy.confidence) * (1.0 - spent) if found else policy.confidence
    return [*found, InterimLook(budget, policy.general_sequences, confidence, last=True)]
