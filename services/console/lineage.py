"""The versions of a run's model: parent, digest, gate, and whether the chain that the log describes holds together."""

from __future__ import annotations

from dataclasses import dataclass

from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.run_report import miner_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Version:
    """A version of the model. `broken` says where the log contradicts itself; empty: the chain holds.

    Version 0 is the base's own rows: nothing was published, and nothing merged.
    """

    version: int
    state: ArtifactRef
    published: cycle_pb2.VersionPublished | None
    kept: bool
    merged: tuple[tuple[str, float], ...]
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
        Version(0, state, None, kept=False, merged=(), time_unix_ms=selected.time_unix_ms,
                broken=_opening(facts, 1, 0, state))
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
        published.version,
        published.state,
        published,
        kept=kept,
        merged=tuple(
            (miner_name(facts, key), weight) for key, weight in zip(published.merged, published.weights, strict=False)
        ),
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
