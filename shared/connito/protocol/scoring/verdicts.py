"""Verdicts on the submissions and validators of a cycle, with reasons. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from connito.protocol.assignment import assigned
from connito.protocol.bans import at_close
from connito.protocol.findings import Refusal, Refusals
from connito.protocol.scoring import newcomers, own_work, ratings, trust
from connito.protocol.scoring.consensus import Consensus, consensus
from connito.protocol.scoring.counted_reports import Reports, draw
from connito.protocol.scoring.own_work import Leaning
from connito.protocol.scoring.ranking import verdicts
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts


def agree(
    facts: RunFacts,
    cycle: int,
    reports: Reports,
    submissions: Sequence[cycle_pb2.Submission],
    stake: Callable[[str], float],
) -> Consensus:
    """Compute the consensus over the drawn validators. One that did not report claims nothing, but its stake still counts.

    Otherwise a lying minority could become half of those that are left, and half is enough to grant a utility. Where
    the seed assigns submissions, each is a matter between the validators that it was assigned to.
    """
    drawn = draw(facts, cycle)
    assert drawn is not None
    silent = [validator for validator in drawn.validators if validator not in reports.counted]
    blank = [cycle_pb2.ScoreReport(validator=validator) for validator in silent]
    votes = trust.votes(facts, cycle, stake)
    stakes = {validator: votes(validator) for validator in drawn.validators}
    found = consensus(
        [*reports.counted.values(), *blank],
        stakes,
        submissions=submissions,
        expected=drawn.omitted,
        assigned=assigned(facts, cycle),
    )
    weighed = stakes if trust.rate(facts) > 0.0 else {}
    found = replace(found, standings=[_honest(standing, reports, weighed) for standing in found.standings])
    out = at_close(facts, "validate", cycle)
    return without(found, {entry.miner: out[entry.miner] for entry in submissions if entry.miner in out})


def _honest(
    standing: cycle_pb2.ValidatorStanding, reports: Reports, weighed: Mapping[str, float]
) -> cycle_pb2.ValidatorStanding:
    name = standing.validator
    if name in reports.counted:
        standing.weight = weighed.get(name, 0.0)
        return standing
    ignored = reports.ignored.get(name)
    found = cycle_pb2.ValidatorStanding(validator=name, reported=False, weight=weighed.get(name, 0.0))
    if ignored is not None and (ignored.reason or name in weighed):
        found.reason = ignored.reason
        found.finding.CopyFrom(ignored.finding)
    return found


def no_quorum(facts: RunFacts, cycle: int, submissions: Sequence[cycle_pb2.Submission], why: Finding) -> Consensus:
    """Return a consensus that judges nobody: utilities are zero, each with the reason."""
    drawn = draw(facts, cycle)
    expected = facts.window("validate", cycle).opened
    names = {*(expected.expected if expected else ()), *(() if drawn is None else (*drawn.validators, *drawn.omitted))}
    reported = facts.reports(cycle)
    standings = [
        cycle_pb2.ValidatorStanding(
            validator=name, reported=name in reported and facts.window("validate", cycle).inside(reported[name])
        )
        for name in sorted(names)
    ]
    reasons = {entry.miner: Refusal(reasons_pb2.REASON_NO_QUORUM, why) for entry in submissions}
    return Consensus({entry.miner: 0.0 for entry in submissions}, reasons, standings, judged=False)


def without(agreed: Consensus, refused: Refusals) -> Consensus:
    """Take submissions out whose artifact turned out to be unusable, whatever validators said about them."""
    utilities = {miner: 0.0 if miner in refused else utility for miner, utility in agreed.utilities.items()}
    return replace(agreed, utilities=utilities, reasons={**agreed.reasons, **refused})


def score_cycle(
    facts: RunFacts,
    cycle: int,
    submissions: Sequence[cycle_pb2.Submission],
    agreed: Consensus,
    copies: Refusals,
    weights: Mapping[str, float],
    unmerged: Refusals,
    leaning: Leaning | None = None,
) -> cycle_pb2.CycleScored:
    """Return the cycle's result. `unmerged` says of those that scored, but have no share in the merge, why."""
    spec = facts.require_spec()
    pot = round(spec.emission * Fraction(spec.rewards.validator_share))
    found, _ = verdicts(
        submissions,
        agreed,
        emission=spec.emission - pot,
        paid_ranks=spec.scoring.paid_ranks,
        weights=weights,
        copies=copies,
        policy=spec.rewards,
    )
    for verdict in found:
        scored = verdict.status == cycle_pb2.VERDICT_STATUS_SCORED
        if scored and verdict.miner in unmerged and verdict.reason == reasons_pb2.REASON_UNSPECIFIED:
            verdict.reason, finding = unmerged[verdict.miner]
            verdict.finding.CopyFrom(finding)
        own_work.withhold(verdict, (leaning or {}).get(verdict.miner))
        newcomers.withhold(facts, cycle, verdict)
    standings, bonded = trust.stand(facts, cycle, agreed, found, pot)
    paid = sum(verdict.reward for verdict in found) + sum(standing.reward for standing in standings)
    return cycle_pb2.CycleScored(
        run=facts.run,
        cycle=cycle,
        verdicts=found,
        validators=standings,
        unallocated=spec.emission - paid,
        bonded=bonded,
        miners=ratings.rate(facts, cycle, found),
    )
