"""Quota and probation of new keys, so that a banned miner gains little by returning under another key.

Each key has one submission a cycle. Keys that were never scored share a quota of places per cycle, earliest commitment
first; those that do not get one are told, and may commit again. Then a key is on probation until some of its submissions
were useful: it is paid a part of its reward, and the rest stays unallocated. A policy may leave out either.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from connito.protocol.findings import Refusal
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts


def over_quota(facts: RunFacts, cycle: int, submissions: Iterable[cycle_pb2.Submission]) -> list[cycle_pb2.Submission]:
    """Return those of a cycle's `submissions`, one a miner, for which the policy's quota of newcomers leaves no place.

    In commit order. A newcomer has no settled submission in an earlier cycle of the run.
    """
    quota = facts.spec.rewards.newcomers_per_cycle if facts.spec is not None else 0
    if not quota:
        return []
    settled = (facts.window("submit", earlier).settled for earlier in range(1, cycle))
    known = {entry.miner for found in settled if found is not None for entry in found.submissions}
    new = sorted((entry for entry in submissions if entry.miner not in known), key=lambda entry: entry.commit_sequence)
    return new[quota:]


def quota_refusal(facts: RunFacts, cycle: int) -> Refusal:
    """Return the refusal of a newcomer without a place."""
    kind, quota = cycle_pb2.FINDING_KIND_NEWCOMER_QUOTA, facts.require_spec().rewards.newcomers_per_cycle
    return Refusal(reasons_pb2.REASON_NEWCOMER_QUOTA, Finding(kind=kind, limit=quota, cycle=cycle))


def withhold(facts: RunFacts, cycle: int, verdict: cycle_pb2.Verdict) -> None:
    """Pay a miner on probation its part: changes the verdict in place, and says so where it has no other reason."""
    policy = facts.require_spec().rewards
    if not policy.probation_cycles or not verdict.reward:
        return
    useful = next((entry.useful for entry in facts.result_before(cycle).miners if entry.miner == verdict.miner), 0)
    if useful >= policy.probation_cycles:
        return
    full = verdict.reward
    verdict.reward = round(full * Fraction(policy.probation_pay))
    verdict.withheld += full - verdict.reward
    if verdict.reason == reasons_pb2.REASON_UNSPECIFIED:
        verdict.reason = reasons_pb2.REASON_PROBATION
        kind, of = cycle_pb2.FINDING_KIND_PROBATION, policy.probation_cycles
        verdict.finding.CopyFrom(Finding(kind=kind, count=useful + 1, limit=of, share=policy.probation_pay))
