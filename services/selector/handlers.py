"""Decide what a created run still needs from the selector, and say what came of it: pure."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from connito.errors import Invalid
from connito.protocol.findings import check_version
from connito.v1 import artifacts_pb2, reasons_pb2, run_pb2
from connito.wire.bounds import cut
from connito.workloads.selecting import Chosen

MAX_DETAIL = 2000
# Kinds of facts after which there is nothing left to select.
SETTLED = ("selected", "selection_failed", "ended")


@dataclass(frozen=True)
class Select:
    """Choose the run's target experts."""

    spec: run_pb2.RunSpec


@dataclass(frozen=True)
class Settled:
    """There is nothing to do, because of this kind of fact."""

    because: str


def decide(spec: run_pb2.RunSpec, standing: Container[str]) -> Select | Settled:
    """Return what is missing. `standing` are those kinds of `SETTLED` that the run has a fact of.

    Raises `Invalid` for a run under newer rules.
    """
    if settled := [kind for kind in SETTLED if kind in standing]:
        return Settled(settled[0])
    check_version(spec)
    return Select(spec)


def made(
    run: str,
    chosen: Chosen,
    report: artifacts_pb2.ArtifactRef,
    theta: artifacts_pb2.ArtifactRef,
    signature: artifacts_pb2.ArtifactRef | None = None,
) -> run_pb2.SelectionMade:
    """Return the selection, as a fact."""
    return run_pb2.SelectionMade(
        run=run,
        layers=chosen.layers(),
        report=report,
        signature=signature,
        initial_state=theta,
        selected_experts=chosen.selection.selected,
        total_experts=chosen.selection.total,
        target_parameters=chosen.target_parameters,
        model_parameters=chosen.model_parameters,
        start=chosen.start,
        routers=chosen.selection.routers,
    )


def failed(run: str, error: Exception) -> run_pb2.SelectionFailed:
    """Return the fact of a failed selection, with the error's reason if it has one. Any other is a fault that the run shows."""
    if not isinstance(error, Invalid):
        what = cut(f"{type(error).__name__}: {error}", MAX_DETAIL)
        return run_pb2.SelectionFailed(run=run, reason=reasons_pb2.REASON_FAULT, detail=what)
    vague = error.reason in (reasons_pb2.REASON_UNSPECIFIED, reasons_pb2.REASON_MALFORMED)
    reason = reasons_pb2.REASON_SELECTION_FAILED if vague else error.reason
    return run_pb2.SelectionFailed(run=run, reason=reason, detail=cut(str(error), MAX_DETAIL))
