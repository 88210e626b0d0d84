"""Decisions on the deposit of a finished run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from connito.library.artifact import ExpertHeader
from connito.library.record import MERGED, ended_at
from connito.library.scores import unscored_for
from connito.v1 import artifacts_pb2, run_pb2
from connito.wire.facts import RunFacts

# Everything that the record of an expert tells is in these.
STREAMS = ("RUNS", "TRAIN", "MERGE", "LIBRARY")


@dataclass(frozen=True)
class Deposit:
    """An expert to write: the final state of a run, the header of its file, and the cycle that published the state."""

    state: artifacts_pb2.ArtifactRef
    header: ExpertHeader
    cycle: int = 0

    def with_base(self, digests: Mapping[str, str]) -> ExpertHeader:
        """Return the header with the base model's digests, as the selection report gives them (`rest`, `rows`)."""
        return replace(self.header, base_fingerprint=digests.get("rest", ""), base_rows=digests.get("rows", ""))


@dataclass(frozen=True)
class NoDeposit:
    """No expert comes out of this run, and why."""

    why: str


def lacks_scores(facts: RunFacts) -> bool:
    """Return whether the expert that a run leaves is still to be scored on what the run names: nobody has, nor said that nobody
    will.
    """
    spec = facts.spec
    asked = facts.benchmarked is None and spec is not None and (spec.benchmarks or spec.tasks)
    return bool(asked) and not unscored_for(facts) and isinstance(plan(facts), Deposit)


def plan(facts: RunFacts) -> Deposit | NoDeposit:
    """Decide what to deposit for a run, given all of its facts."""
    spec, selection, ended = facts.spec, facts.selection, facts.ended
    if ended is None or ended.outcome != run_pb2.RUN_OUTCOME_COMPLETED:
        return NoDeposit("the run did not complete")
    history = list(facts.versions.values())
    if spec is None or selection is None or not history:
        return NoDeposit("the run published no model version")
    if not any(version.gate in MERGED for version in history):
        return NoDeposit("no submission was merged: the final state is the base's own")
    if facts.deposits:
        return NoDeposit("the expert is already deposited")
    final = ended_at(facts, history)
    layers = {layer.layer: sorted(layer.experts) for layer in selection.layers}
    header = ExpertHeader(spec.domain, spec.base.name, spec.base.manifest.digest, layers, spec.run, final.version)
    return Deposit(final.state, header, final.cycle)
