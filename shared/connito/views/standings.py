"""Standings of validators and miners after a cycle: a pure projection of the cycle's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from connito.v1 import cycle_pb2
from connito.views.sentences import detail_of
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class ValidatorRow:
    """A validator in one cycle that was judged. `agreement`, `weight` and `trust` are None where the run's policy does not
    move trust."""

    validator: str
    reported: bool
    idle: bool
    deviation: float
    agreement: float | None
    trust: float | None
    weight: float | None
    reward: int
    reason: str
    detail: str


def _scored(facts: RunFacts, cycle: int) -> cycle_pb2.CycleScored:
    return facts.scored(cycle) or cycle_pb2.CycleScored()


def validator_rows(facts: RunFacts, cycle: int) -> list[ValidatorRow]:
    """Return each validator's report and standing in a cycle, sorted by key. Nothing before the cycle's result."""
    moves = facts.spec is not None and facts.spec.rewards.bond_rate > 0
    return [
        ValidatorRow(
            standing.validator,
            standing.reported,
            standing.idle,
            standing.deviation,
            agreement=standing.agreement if moves and not standing.idle else None,
            trust=standing.trust if moves else None,
            weight=standing.weight if moves and not standing.idle else None,
            reward=standing.reward,
            reason=reason_name(standing.reason),
            detail=detail_of(standing),
        )
        for standing in _scored(facts, cycle).validators
    ]


def ratings(facts: RunFacts, cycle: int) -> dict[str, dict[str, Any]]:
    """Return each judged miner's rating after a cycle, by key: μ, σ, and in how many cycles it was judged and useful."""
    return {
        standing.miner: {
            "mu": standing.mu,
            "sigma": standing.sigma,
            "judged": standing.judged,
            "useful": standing.useful,
        }
        for standing in _scored(facts, cycle).miners
    }


def rating_text(rating: dict[str, Any] | None) -> str:
    """Return `31.2 ± 7.9`; empty for none."""
    return "" if rating is None else f"{rating['mu']:.1f} ± {rating['sigma']:.1f}"


def paid(facts: RunFacts, cycle: int) -> dict[str, int]:
    """Return a cycle's emission by receiver: units for miners, for validators, and unearned ones."""
    scored = _scored(facts, cycle)
    return {
        "miners": sum(verdict.reward for verdict in scored.verdicts),
        "validators": sum(standing.reward for standing in scored.validators),
        "unallocated": scored.unallocated,
    }
