"""Weights and rewards of validators: agreement, trust and bonds, cycle by cycle.

With utilities W_ij claimed by validator i for submission j, and the consensus W̄_j:

- agreement a_i = Σ_j min(W_ij, W̄_j) / Σ_j max(W_ij, W̄_j) over the submissions that i had to score: 1 where it says what
  the consensus says (or both say nothing helped), near 0 where it grants what nobody else grants or takes what others
  grant. Claims are utilities in nats per token, not shares of a row, so both directions have to count; Yuma's own
  validator trust, with rows that sum to one, needs only the clipped part. A duty that was taken on and left counts 0:
  a secret committed to and withheld, a report that is missing, late or misassigned.
- trust T_i ← (1 − α)·T_i + α·a_i with α the policy's bond rate, from 1. A vote weighs stake · max(¼, T_i). Without that
  bound two of three equal validators would be all that is left of a vote as the third one's trust goes to 0, and half of
  two is one: whoever is a little above the other could then grant utilities alone. With it the weights of three equal
  validators stay such that it takes two.
- bonds B_ij ← (1 − α)·B_ij + α·ΔB_ij, ΔB_ij = w_i·min(W_ij, W̄_j) / Σ_k w_k·min(W_kj, W̄_j) (Yuma), w the weights of the
  votes, for submissions j with W̄_j > 0 by the validators that were to score them. A validator's share of what
  validators earn is its dividend Σ_j (B_ij / Σ_k B_kj)·I_j with I_j miner j's share of this cycle's reward; one without
  a report that counts has none.

All of it follows from the reports and from the result of the cycle before, which the log holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from connito.protocol.findings import Refusal
from connito.protocol.scoring.consensus import Consensus
from connito.protocol.scoring.payout import apportion
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts

# The least part of its stake that a validator's vote keeps.
FLOOR = 0.25
# A report that agrees less than this with consensus is said to deviate.
DEVIATES = 0.5

Votes = Callable[[str], float]


def rate(facts: RunFacts) -> float:
    """Return α of the run's policy; 0 where trust does not move."""
    return facts.spec.rewards.bond_rate if facts.spec is not None else 0.0


def votes(facts: RunFacts, cycle: int, stake: Votes) -> Votes:
    """Return the weight of each validator's vote in a cycle: its stake, by the trust that earlier cycles left it.

    The stake is the one that the log counts. `stake`: the roster's, of whoever joined and was not counted yet.
    """

    def counted(validator: str) -> float:
        known = facts.stake(validator)
        return stake(validator) if known is None else known

    if rate(facts) <= 0.0:
        return counted
    trust = {standing.validator: standing.trust for standing in facts.result_before(cycle).validators}
    return lambda validator: counted(validator) * max(FLOOR, trust.get(validator, 1.0))


def agreement(claims: Mapping[str, float], utilities: Mapping[str, float]) -> float:
    """Return a_i of a validator's claims against the agreed `utilities` of the same submissions."""
    shared = math.fsum(min(claim, utilities[miner]) for miner, claim in claims.items())
    either = math.fsum(max(claim, utilities[miner]) for miner, claim in claims.items())
    return shared / either if either > 0.0 else 1.0


def stand(
    facts: RunFacts, cycle: int, agreed: Consensus, verdicts: Sequence[cycle_pb2.Verdict], pot: int
) -> tuple[list[cycle_pb2.ValidatorStanding], list[str]]:
    """Return everybody's standing after a cycle, and the miners that bonds are held of.

    `agreed.standings` say who reported and with what weight. `pot` units are shared out by dividends, where there are
    any. Validators without a duty in this cycle keep what they had.
    """
    alpha = rate(facts)
    if alpha <= 0.0:
        return list(agreed.standings), []
    earlier = {standing.validator: standing for standing in facts.result_before(cycle).validators}
    found = [_stepped(facts, cycle, agreed, standing, earlier, alpha) for standing in agreed.standings]
    named = {standing.validator for standing in found}
    found += [_idle(standing) for name, standing in earlier.items() if name not in named]
    found.sort(key=lambda standing: standing.validator)
    bonded = _bonds(facts.result_before(cycle), agreed, verdicts, found, alpha)
    for standing, units in zip(found, apportion(pot, _dividends(found, bonded, verdicts)), strict=True):
        standing.reward = units
    return found, bonded


def _stepped(
    facts: RunFacts,
    cycle: int,
    agreed: Consensus,
    standing: cycle_pb2.ValidatorStanding,
    earlier: Mapping[str, cycle_pb2.ValidatorStanding],
    alpha: float,
) -> cycle_pb2.ValidatorStanding:
    """Return one validator's agreement and trust, with the reason where it lost weight."""
    name, step = standing.validator, cycle_pb2.ValidatorStanding()
    step.CopyFrom(standing)
    trust = earlier[name].trust if name in earlier else 1.0
    if not agreed.judged and (standing.reported or _revealed_in_vain(facts, cycle, name)):
        # It did its duty, and there is nothing to compare it with.
        step.trust, step.idle = trust, True
        return step
    if standing.reported:
        step.agreement = agreement(agreed.claims[name], agreed.agreed)
        if step.agreement < DEVIATES:
            step.reason = reasons_pb2.REASON_DEVIATED
            step.finding.CopyFrom(Finding(kind=cycle_pb2.FINDING_KIND_DEVIATED, agreement=step.agreement))
    elif not step.reason:
        step.reason, finding = _left(facts, cycle, name)
        if not step.HasField("finding"):
            step.finding.CopyFrom(finding)
    step.trust = (1.0 - alpha) * trust + alpha * step.agreement
    return step


def _revealed_in_vain(facts: RunFacts, cycle: int, validator: str) -> bool:
    drawn, closed = facts.drawn(cycle), facts.window("validate", cycle).closed
    reveal = facts.seed_reveals(cycle).get(validator)
    # Who went on behind the close was not there, whenever this is computed.
    in_time = reveal is not None and (closed is None or reveal.sequence <= closed.last_sequence)
    return in_time and (drawn is None or not drawn.validators)


def _left(facts: RunFacts, cycle: int, validator: str) -> Refusal:
    """Return the reason for a duty that was not done."""
    drawn = facts.drawn(cycle)
    if drawn is not None and validator in drawn.validators:
        return Refusal(reasons_pb2.REASON_NO_REPORT, Finding(kind=cycle_pb2.FINDING_KIND_NO_REPORT))
    return Refusal(reasons_pb2.REASON_SEED_WITHHELD, Finding(kind=cycle_pb2.FINDING_KIND_SECRET_WITHHELD))


def _idle(standing: cycle_pb2.ValidatorStanding) -> cycle_pb2.ValidatorStanding:
    return cycle_pb2.ValidatorStanding(
        validator=standing.validator, trust=standing.trust, bonds=standing.bonds, idle=True
    )


def _bonds(
    earlier: cycle_pb2.CycleScored,
    agreed: Consensus,
    verdicts: Sequence[cycle_pb2.Verdict],
    standings: Sequence[cycle_pb2.ValidatorStanding],
    alpha: float,
) -> list[str]:
    """Step every validator's bonds, in place; the miners they are held of, sorted."""
    useful = {verdict.miner: verdict.utility for verdict in verdicts if verdict.utility > 0.0}
    held = {standing.validator: dict(zip(earlier.bonded, standing.bonds)) for standing in earlier.validators}  # noqa: B905
    bonded = sorted({*earlier.bonded, *useful})
    columns = {miner: _column(miner, agreed, standings) for miner in useful}
    for standing in standings:
        old = held.get(standing.validator, {})
        del standing.bonds[:]
        for miner in bonded:
            bond, change = old.get(miner, 0.0), columns.get(miner, {}).get(standing.validator)
            standing.bonds.append(bond if change is None else (1.0 - alpha) * bond + alpha * change)
    return bonded


def _column(miner: str, agreed: Consensus, standings: Sequence[cycle_pb2.ValidatorStanding]) -> dict[str, float]:
    """Return ΔB of one miner by validator; empty where nobody backs it."""
    backing = {
        standing.validator: standing.weight * min(agreed.claims[standing.validator][miner], agreed.agreed[miner])
        for standing in standings
        if miner in agreed.claims.get(standing.validator, {})
    }
    total = math.fsum(backing.values())
    return {validator: value / total for validator, value in backing.items()} if total > 0.0 else {}


def _dividends(
    standings: Sequence[cycle_pb2.ValidatorStanding], bonded: Sequence[str], verdicts: Sequence[cycle_pb2.Verdict]
) -> list[Fraction]:
    """Return each validator's share of what validators earn, in the order of `standings`."""
    income = {verdict.miner: Fraction(verdict.reward) for verdict in verdicts}
    shares = [Fraction(0)] * len(standings)
    for column, miner in enumerate(bonded):
        held = [Fraction(standing.bonds[column]) if standing.reported else Fraction(0) for standing in standings]
        total = sum(held)
        if total > 0 and income.get(miner):
            shares = [share + bond / total * income[miner] for share, bond in zip(shares, held, strict=True)]
    return shares
