"""A finished run of two cycles, as facts: one version merged from two miners, one that kept the incumbent."""

from __future__ import annotations

import pytest
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2, run_pb2
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import FactKey
from google.protobuf.message import Message

RUN = "run-1"


def ref(digest: str) -> artifacts_pb2.ArtifactRef:
    return artifacts_pb2.ArtifactRef(digest=digest * 64, size=10, media_type="x", realm=artifacts_pb2.REALM_PUBLIC)


def spec() -> run_pb2.RunSpec:
    return run_pb2.RunSpec(
        run=RUN,
        domain="medical",
        cycles=2,
        base=run_pb2.BaseRef(name="smol", manifest=ref("b")),
        selection=run_pb2.SelectionPolicy(method="esft-token", threshold=0.5),
        license="CC-BY-4.0",
        data_statement="definitions | of symptoms\nin one table",
    )


def verdict(miner: str, status: int, reward: int, reason: int = 0) -> cycle_pb2.Verdict:
    return cycle_pb2.Verdict(miner=miner, status=status, reward=reward, reason=reason, weight=0.5 if reward else 0)


def version(cycle: int, gate: int, state: str, before: float, after: float) -> cycle_pb2.VersionPublished:
    losses = [
        cycle_pb2.DomainLoss(domain="medical", before=before, after=after, tokens=640),
        cycle_pb2.DomainLoss(domain="code", before=2.0, after=2.001, tokens=320),
    ]
    merged = ["UA", "UB"] if gate == cycle_pb2.GATE_DECISION_ACCEPTED else []
    return cycle_pb2.VersionPublished(
        run=RUN,
        cycle=cycle,
        version=cycle,
        parent=cycle - 1,
        state=ref(state),
        gate=gate,
        losses=losses,
        merged=merged,
        weights=[0.5] * len(merged),
    )


def messages() -> list[tuple[FactKey, Message]]:
    layers = [run_pb2.LayerSelection(layer=2, experts=[5, 1]), run_pb2.LayerSelection(layer=3, experts=[0])]
    selected = run_pb2.SelectionMade(
        run=RUN, layers=layers, report=ref("d"), initial_state=ref("0"), selected_experts=3, total_experts=16,
        target_parameters=300, model_parameters=4000,
    )  # fmt: skip
    merged, rejected = cycle_pb2.VERDICT_STATUS_MERGED, cycle_pb2.VERDICT_STATUS_REJECTED
    first = [verdict("UA", merged, 60), verdict("UB", merged, 40), verdict("UC", rejected, 0, reasons_pb2.REASON_COPY)]
    second = [verdict("UC", rejected, 0, reasons_pb2.REASON_COPY)]
    return [
        (FactKey("run", 0, "created"), run_pb2.RunCreated(spec=spec())),
        (FactKey("run", 0, "selected"), selected),
        (FactKey("run", 0, "miner", "UA"), run_pb2.MinerEnrolled(run=RUN, miner="UA", label="anna")),
        (FactKey("train", 1, "opened"), cycle_pb2.WindowOpened(run=RUN, cycle=1, state=ref("0"))),
        (FactKey("train", 2, "opened"), cycle_pb2.WindowOpened(run=RUN, cycle=2, state=ref("1"))),
        (FactKey("merge", 1, "scored"), cycle_pb2.CycleScored(run=RUN, cycle=1, verdicts=first)),
        (FactKey("merge", 1, "version"), version(1, cycle_pb2.GATE_DECISION_ACCEPTED, "1", 3.0, 2.5)),
        (FactKey("merge", 2, "scored"), cycle_pb2.CycleScored(run=RUN, cycle=2, verdicts=second)),
        (FactKey("merge", 2, "version"), version(2, cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, "1", 2.5, 2.5)),
        (
            FactKey("run", 0, "ended"),
            run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_COMPLETED, final_version=2),
        ),
    ]


def build(pairs: list[tuple[FactKey, Message]]) -> RunFacts:
    facts = RunFacts(RUN)
    for sequence, (key, message) in enumerate(pairs, start=1):
        facts.add(Fact(RUN, key, message, "UX", "RUNS", sequence, 1_900_000_000_000 + sequence))
    return facts


@pytest.fixture
def pairs() -> list[tuple[FactKey, Message]]:
    return messages()


@pytest.fixture
def finished(pairs: list[tuple[FactKey, Message]]) -> RunFacts:
    return build(pairs)


@pytest.fixture
def rebuild():
    return build
