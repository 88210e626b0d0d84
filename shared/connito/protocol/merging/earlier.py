"""Works of earlier cycles, beside which those of a cycle are held: who hands one in again, in whatever form, has made nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from connito.protocol.scoring.copies import REMEMBERED_CYCLES
from connito.v1 import cycle_pb2
from connito.wire.facts import RunFacts

# Each is read again in every cycle: those of the last cycles, the best paid first.
MOST = 64


@dataclass(frozen=True)
class EarlierWork:
    """A work of an earlier cycle, its file as it was uploaded, and the state that it began from."""

    entry: cycle_pb2.Submission
    state: Path
    base: Path


def earlier_works(facts: RunFacts, cycle: int) -> list[cycle_pb2.Submission]:
    """Return the works that those of a cycle are compared with.

    Where a run keeps the artifacts of its last cycles only, these are of the one before, which an audit still has.
    """
    spec = facts.require_spec()
    back = 1 if spec.retention.cycles else REMEMBERED_CYCLES
    found: list[cycle_pb2.Submission] = []
    for before in range(cycle - 1, max(0, cycle - 1 - back), -1):
        if len(found) < MOST:
            found += _accepted(facts, before, begun_there=bool(spec.retention.cycles))
    return found[:MOST]


def _accepted(facts: RunFacts, cycle: int, *, begun_there: bool) -> Sequence[cycle_pb2.Submission]:
    """Return the works of a cycle that were no copies and not at fault, the best paid first."""
    scored, settled = facts.scored(cycle), facts.window("submit", cycle).settled
    if scored is None or settled is None:
        return ()
    entries = {entry.miner: entry for entry in settled.submissions}
    rewards = {
        verdict.miner: verdict.reward
        for verdict in scored.verdicts
        if verdict.status != cycle_pb2.VERDICT_STATUS_REJECTED and verdict.miner in entries
    }
    miners = sorted(rewards, key=lambda miner: (-rewards[miner], miner))
    return [
        entries[miner]
        for miner in miners
        if entries[miner].base_state.digest and (not begun_there or entries[miner].origin_cycle == cycle)
    ]
