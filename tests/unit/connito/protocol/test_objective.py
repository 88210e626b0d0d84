from __future__ import annotations

import pytest
from connito.protocol.objective import gained, reached
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey


def run(improvement: float, *gate: tuple[float, float]) -> RunFacts:
    """A run of nine cycles whose versions have these gate losses of the target, before and after."""
    facts = RunFacts("r")
    spec = run_pb2.RunSpec(run="r", domain="law", cycles=9, holdout=run_pb2.CorpusRef(domain="law"))
    spec.objective.improvement = improvement
    add(facts, FactKey("run", 0, "created"), run_pb2.RunCreated(spec=spec))
    for cycle, (before, after) in enumerate(gate, start=1):
        add(facts, FactKey("train", cycle, "opened"), cycle_pb2.WindowOpened(run="r", cycle=cycle))
        version = cycle_pb2.VersionPublished(run="r", cycle=cycle, version=cycle)
        version.gate_losses.add(domain="law", before=before, after=after, tokens=64)
        version.losses.add(domain="law", before=9.0, after=0.0, tokens=64)
        add(facts, FactKey("merge", cycle, "version"), version)
    return facts


def add(facts: RunFacts, key: FactKey, message: object) -> None:
    facts.add(Fact("r", key, message, "K", "S", len(facts.facts) + 1, 0))  # type: ignore[arg-type]


def test_the_gain_is_from_the_start_of_the_run_and_on_the_gates_text() -> None:
    facts = run(0.5, (3.0, 2.8), (2.8, 2.4))

    assert gained(facts, 1) == pytest.approx(0.2)
    assert gained(facts, 2) == pytest.approx(0.6)
    assert reached(facts, 1) is None
    met = reached(facts, 2)
    assert met is not None
    assert (met.domain, met.margin, met.cycle, met.limit) == ("law", 0.5, 2, 9)
    assert met.effect == pytest.approx(0.6)


def test_without_an_objective_nothing_is_enough() -> None:
    assert reached(run(0.0, (3.0, 1.0)), 1) is None


def test_what_was_not_measured_is_not_reached() -> None:
    assert reached(run(0.1), 1) is None
    assert reached(run(0.1, (float("nan"), float("nan"))), 1) is None
