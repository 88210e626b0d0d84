"""Progress of a run: cycles in which nobody was useful, how training adapts to them, and when the run gives up. Pure.

All of it follows from the facts of the cycles before, so coordinator, miners and auditors come to the same by themselves.
"""

from __future__ import annotations

from connito.v1 import reasons_pb2 as reasons
from connito.v1.run_pb2 import TrainPolicy
from connito.wire.facts import RunFacts

# Reasons that other settings of the training may remove.
_OF_TRAINING = frozenset(
    {
        reasons.REASON_NO_IMPROVEMENT,
        reasons.REASON_NOT_SIGNIFICANT,
        reasons.REASON_RETENTION_BROKEN,
        reasons.REASON_NORM_EXCEEDED,
        reasons.REASON_GATE_REJECTED,
    }
)
# Cycles without anything useful after which a run that never merged anything ends; the rate is then an eighth.
GIVE_UP = 3
# The share that a run without replay begins with, where it has text for it, and the largest that it raises it to by itself.
FIRST_REPLAY = 0.125
MOST_REPLAY = 0.5


def merged_anything(facts: RunFacts) -> bool:
    """Return whether any version holds the work of a miner."""
    # One by one from the first: where anything was, it was early, and a long run need not be looked through.
    versions = (facts.version(cycle) for cycle in facts.cycles())
    return any(version is not None and version.merged for version in versions)


def barren(facts: RunFacts, cycle: int) -> bool:
    """Return whether a cycle's work was judged and nothing of it was of use, for reasons that lie in the training."""
    version, scored = facts.version(cycle), facts.scored(cycle)
    if version is None or scored is None or version.merged:
        return False
    return any(verdict.reason in _OF_TRAINING for verdict in scored.verdicts)


def barren_before(facts: RunFacts, cycle: int) -> int:
    """Return how many cycles right before `cycle` were barren, at most `GIVE_UP`."""
    count = 0
    while count < GIVE_UP and barren(facts, cycle - 1 - count):
        count += 1
    return count


def hopeless(facts: RunFacts) -> bool:
    """Return whether more cycles would change nothing: nothing was ever merged, with the rate lowered again and again."""
    return not merged_anything(facts) and barren_before(facts, facts.cycle + 1) >= GIVE_UP


def training(facts: RunFacts, cycle: int) -> TrainPolicy:
    """Return the training policy of a cycle: the run's own, with half the rate and twice the replay for each barren
    cycle right before it."""
    spec, policy = facts.require_spec(), TrainPolicy()
    policy.CopyFrom(spec.training)
    times = barren_before(facts, cycle)
    if times:
        policy.learning_rate *= 0.5**times
        if spec.replay.artifact.digest and policy.replay_share < MOST_REPLAY:
            policy.replay_share = min(MOST_REPLAY, max(policy.replay_share, FIRST_REPLAY / 2) * 2**times)
    return policy
