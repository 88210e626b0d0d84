"""When a run has done enough before its cycles are used up: one rule, for the coordinator and for the audit. Pure."""

from __future__ import annotations

from connito.v1 import cycle_pb2
from connito.wire.facts import RunFacts


def gained(facts: RunFacts, cycle: int) -> float | None:
    """Nats per token by which the target's gate loss fell from the run's start to the version of `cycle`.

    The gate's subset, not the report's: stopping on what is reported would flatter it. None where it was not measured.
    """
    first = next((version for number in facts.cycles() if (version := facts.version(number)) is not None), None)
    last = facts.version(cycle)
    if first is None or last is None:
        return None
    begin, end = _target(facts, first), _target(facts, last)
    return None if begin is None or end is None else begin.before - end.after


def reached(facts: RunFacts, cycle: int) -> str:
    """The sentence a run ends with when its objective is met after `cycle`; empty while it is not, or has none."""
    spec = facts.spec
    wanted = 0.0 if spec is None else spec.objective.improvement
    gain = gained(facts, cycle) if wanted > 0 else None
    if spec is None or gain is None or not gain >= wanted:
        return ""
    return (
        f"the objective is met after cycle {cycle} of {spec.cycles}: {spec.domain} loss on the gate's text is {gain:.4f} "
        f"nats per token lower than at the start, {wanted:g} were asked for"
    )


def _target(facts: RunFacts, version: cycle_pb2.VersionPublished) -> cycle_pb2.DomainLoss | None:
    domain = "" if facts.spec is None else facts.spec.holdout.domain
    return next((loss for loss in version.gate_losses if loss.domain == domain and loss.tokens), None)
