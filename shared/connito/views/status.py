"""Project the facts of a run into its status in the API."""

from __future__ import annotations

from connito.protocol.quorum import Pause, pause, turnout
from connito.protocol.rules import Stake, due_ms
from connito.v1 import run_pb2, services_pb2
from connito.views.sentences import why_left
from connito.wire.facts import RunFacts

_PHASES = {
    run_pb2.RUN_OUTCOME_COMPLETED: services_pb2.RUN_PHASE_COMPLETED,
    run_pb2.RUN_OUTCOME_FAILED: services_pb2.RUN_PHASE_FAILED,
    run_pb2.RUN_OUTCOME_CANCELLED: services_pb2.RUN_PHASE_CANCELLED,
    run_pb2.RUN_OUTCOME_NO_IMPROVEMENT: services_pb2.RUN_PHASE_NO_IMPROVEMENT,
}


def phase(facts: RunFacts, here: Pause | None) -> services_pb2.RunPhase.ValueType:
    """Return the phase of a created run; the time is the broker's."""
    if facts.ended is not None:
        return _PHASES.get(facts.ended.outcome, services_pb2.RUN_PHASE_FAILED)
    if facts.selection is None:
        return services_pb2.RUN_PHASE_SELECTING
    if here is not None:
        return services_pb2.RUN_PHASE_PAUSED
    return services_pb2.RUN_PHASE_RUNNING if facts.cycle else services_pb2.RUN_PHASE_ASSEMBLING


def version(facts: RunFacts) -> int:
    """Return the newest published version; 0 is the base."""
    return 0 if facts.latest_version is None else facts.latest_version.version


def status(facts: RunFacts, now_ms: int, stake: Stake) -> services_pb2.RunStatus:
    """Return the status of a run that was created."""
    newest = facts.latest_version
    window, here = facts.open_window if facts.ended is None else None, pause(facts, now_ms, stake)
    return services_pb2.RunStatus(
        spec=facts.spec,
        phase=phase(facts, here),
        cycle=facts.cycle,
        window="" if window is None else window.name,
        deadline_unix_ms=0 if window is None else due_ms(facts, window),
        version=version(facts),
        miners=facts.miners,
        validators=facts.validators,
        detail=_detail(facts, here),
        losses=() if newest is None else newest.losses,
        merged=() if newest is None else newest.merged,
    )


def _detail(facts: RunFacts, here: Pause | None) -> str:
    left = why_left(facts)
    if facts.ended is not None:
        return "; ".join(part for part in (facts.ended.detail, left) if part)
    if left:
        return left
    spec = facts.require_spec()
    if facts.selection is None:
        return "waiting for the selector"
    if not facts.cycle:
        return turnout(len(facts.miners), len(facts.validators), spec.windows)
    waits = "" if here is None else f" is paused: {here}"
    return f"cycle {facts.cycle} of {spec.cycles}{waits}"
