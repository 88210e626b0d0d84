"""The versions of a run's model: parent, digest, gate, and whether the chain that the log describes holds together."""

from __future__ import annotations

from dataclasses import dataclass

from connito.render import formats
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views import words
from connito.views.run_report import miner_name
from connito.views.sentences import detail_of
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Measured:
    """A loss before and after, in nats per token."""

    domain: str
    before: float
    after: float


@dataclass(frozen=True)
class Version:
    """A version of the model. `broken` says where the log contradicts itself; empty: the chain holds.

    Version 0 is the base's own rows, and has no gate.
    """

    version: int
    parent: int | None
    cycle: int
    digest: str
    size: str
    gate: str
    gate_detail: str
    kept: bool
    merged: tuple[tuple[str, float], ...]
    gate_losses: tuple[Measured, ...]
    time_unix_ms: int
    broken: str


def lineage(facts: RunFacts) -> list[Version]:
    """Return every version, from the base on."""
    selected = facts.selected_fact
    selection = facts.selection
    if selected is None or selection is None:
        return []
    state = selection.initial_state
    versions = [
        Version(0, None, 0, state.digest, formats.size(state.size), "", "", False, (), (), selected.time_unix_ms,
                _opening(facts, 1, 0, state))
    ]  # fmt: skip
    known = {0: state}
    for cycle in facts.cycles():
        fact = facts.version_fact(cycle)
        if fact is not None:
            versions.append(_version(facts, cycle, fact, known))
            known[fact.message.version] = fact.message.state
    return versions


def _version(
    facts: RunFacts, cycle: int, fact: Fact[cycle_pb2.VersionPublished], known: dict[int, ArtifactRef]
) -> Version:
    published = fact.message
    kept = published.gate in (cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE)
    return Version(
        version=published.version,
        parent=published.parent,
        cycle=cycle,
        digest=published.state.digest,
        size=formats.size(published.state.size),
        gate=words.gate(published.gate),
        gate_detail=detail_of(published),
        kept=kept,
        merged=tuple(
            (miner_name(facts, key), weight) for key, weight in zip(published.merged, published.weights, strict=False)
        ),
        gate_losses=tuple(Measured(loss.domain, loss.before, loss.after) for loss in published.gate_losses),
        time_unix_ms=fact.time_unix_ms,
        broken=_contradiction(published, kept, known) or _opening(facts, cycle + 1, published.version, published.state),
    )


def _contradiction(published: cycle_pb2.VersionPublished, kept: bool, known: dict[int, ArtifactRef]) -> str:
    parent = known.get(published.parent)
    if parent is None:
        return f"its parent, version {published.parent}, was never published"
    if kept and parent.digest != published.state.digest:
        return "the gate kept the incumbent, but the state is another one"
    return ""


def _opening(facts: RunFacts, cycle: int, version: int, state: ArtifactRef) -> str:
    """Return whether the next cycle starts from what this one published."""
    opened = facts.window("train", cycle).opened
    if opened is None or (opened.version == version and opened.state.digest == state.digest):
        return ""
    return f"cycle {cycle} started from version {opened.version} with another state"
