"""Words for a run that improved nothing: why, what to do about it, and which expert of the shelf serves instead."""

from __future__ import annotations

from collections import Counter

from connito.protocol.progress import MOST_REPLAY, training
from connito.render import formats
from connito.v1 import reasons_pb2 as r
from connito.v1.run_pb2 import StartCandidate
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts

_MORE_TEXT = "give more text, or more cycles of more local steps (policies.training.local_steps)"
REMEDIES: dict[int, str] = {
    r.REASON_NO_IMPROVEMENT: _MORE_TEXT,
    r.REASON_NOT_SIGNIFICANT: f"hold out more text, which tells smaller gains from chance, or {_MORE_TEXT}",
    r.REASON_NORM_EXCEEDED: "lower policies.training.learning_rate",
    r.REASON_GATE_REJECTED: "lower policies.training.learning_rate, and give more text",
}


def why_nothing(facts: RunFacts) -> str:
    """Return why nothing came out of a run, the remedy, and the best expert that its selector measured."""
    cycles = [cycle for cycle in facts.cycles() if facts.version(cycle) is not None]
    reasons = Counter(
        verdict.reason
        for cycle in cycles
        if (scored := facts.scored(cycle)) is not None
        for verdict in scored.verdicts
        if verdict.reason
    )
    judged = formats.count(len(cycles), "cycle")
    if not reasons:
        return f"no work was judged in {judged}; see that miners and validators take part, and submit it again"
    counted = ", ".join(f"{reason_name(reason)} {count}" for reason, count in reasons.most_common())
    what = f"nobody's work was of use in {judged} ({counted})"
    return "; ".join(
        part for part in (what, _remedy(facts, reasons.most_common(1)[0][0], len(cycles)), shelf(facts)) if part
    )


def _remedy(facts: RunFacts, reason: int, cycles: int) -> str:
    if reason != r.REASON_RETENTION_BROKEN:
        return REMEDIES.get(reason, "`connito job report` says why each was refused")
    last = training(facts, cycles)
    if not last.replay_share:
        return (
            "general text was forgotten: mix it in with `replay: 0.25`; `connito job quote` finds the share that holds"
        )
    if last.replay_share < MOST_REPLAY:
        return f"general text was forgotten: raise `replay` (it was {last.replay_share:g}), or lower the learning rate"
    return (
        f"general text was forgotten at a learning rate of {last.learning_rate:g} and a replay of {last.replay_share:g}: lower "
        "the rate (policies.training.learning_rate), or give `general` text that is nearer to what must not be forgotten"
    )


def best_on_shelf(facts: RunFacts) -> StartCandidate | None:
    """Return the expert that surely saves most on the run's probe, of those that the selector measured."""
    if facts.selection is None:
        return None
    helping = [row for row in facts.selection.start.candidates if row.measured and row.low > 0]
    return max(helping, key=lambda row: row.saved, default=None)


def shelf(facts: RunFacts) -> str:
    """Return how to take the best expert of the shelf for this text; empty where none is known to help."""
    best = best_on_shelf(facts)
    if best is None:
        return ""
    return (
        f"for this text the shelf has {best.expert_id}, which saves {best.saved:.4f} nats per token as it is: "
        f"`connito library export {best.expert_id} --out expert`"
    )
