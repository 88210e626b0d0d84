"""Rule by which a run ends early because its objective is met, for the coordinator and for the audit. Pure."""

from __future__ import annotations

from connito.v1 import cycle_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts


def gained(facts: RunFacts, cycle: int) -> float | None:
    """Return nats per token by which the target's gate loss fell from the run's start to the version of `cycle`.

    The gate's subset, not the report's: stopping on what is reported would flatter it. None where it was not measured.
    """
    first, last = facts.version(1), facts.version(cycle)
    if first is None or last is None:
        return None
    begin, end = _target(facts, first), _target(facts, last)
    return None if begin is None or end is None else begin.before - end.after


def reached(facts: RunFacts, cycle: int) -> Finding | None:
    """Return that the objective is met after `cycle`; None while it is not, or there is none."""
    spec = facts.spec
    wanted = 0.0 if spec is None else spec.objective.improvement
    gain = gained(facts, cycle) if wanted > 0 else None
    if spec is None or gain is None or not gain >= wanted:
        return None
    kind = cycle_pb2.FINDING_KIND_OBJECTIVE_MET
    return Finding(kind=kind, domain=spec.domain, effect=gain, margin=wanted, cycle=cycle, limit=spec.cycles)


def _target(facts: RunFacts, version: cycle_pb2.VersionPublished) -> cycle_pb2.DomainLoss | None:
    domain = "" if facts.spec is None else facts.spec.holdout.domain
    return next((loss for loss in version.gate_losses if loss.domain == domain and loss.tokens), None)
