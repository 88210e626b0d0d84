"""A finished run of two cycles: one version merged from two miners, one that kept the incumbent.

`finished`  its facts
`pairs`     its messages by key, in order, to be changed; `rebuild(pairs)` makes facts of them
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2, run_pb2
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey
from google.protobuf.message import Message

from tests.support.run import Run
from tests.support.run import ref as reference

START = 1_900_000_000_000
Pairs = list[tuple[FactKey, Message]]


def ref(digest: str) -> artifacts_pb2.ArtifactRef:
    return reference(digest * 64)


def verdict(
    miner: str,
    status: cycle_pb2.VerdictStatus.ValueType,
    reward: int,
    reason: reasons_pb2.Reason.ValueType = reasons_pb2.REASON_UNSPECIFIED,
) -> cycle_pb2.Verdict:
    return cycle_pb2.Verdict(miner=miner, status=status, reward=reward, reason=reason, weight=0.5 if reward else 0)


def losses(before: float, after: float) -> list[cycle_pb2.DomainLoss]:
    return [
        cycle_pb2.DomainLoss(domain="medical", before=before, after=after, tokens=640),
        cycle_pb2.DomainLoss(domain="code", before=2.0, after=2.001, tokens=320),
    ]


def finished_run() -> Run:
    run = Run("medical", "run-1", now=START, step_ms=1)
    run.created(
        cycles=2,
        base=run_pb2.BaseRef(name="smol", manifest=ref("b")),
        selection=run_pb2.SelectionPolicy(method="esft-token", threshold=0.5),
        license="CC-BY-4.0",
        data_statement="definitions | of symptoms\nin one table",
    )
    layers = [run_pb2.LayerSelection(layer=2, experts=[5, 1]), run_pb2.LayerSelection(layer=3, experts=[0])]
    run.selected(
        layers=layers, report=ref("d"), initial_state=ref("0"), selected_experts=3, total_experts=16,
        target_parameters=300, model_parameters=4000,
    )  # fmt: skip
    run.miners("UA", label="anna")
    run.opened("train", 1, state=ref("0")).opened("train", 2, state=ref("1"))
    merged, rejected = cycle_pb2.VERDICT_STATUS_MERGED, cycle_pb2.VERDICT_STATUS_REJECTED
    copy = verdict("UC", rejected, 0, reasons_pb2.REASON_COPY)
    run.scored(verdict("UA", merged, 60), verdict("UB", merged, 40), copy)
    accepted, kept = cycle_pb2.GATE_DECISION_ACCEPTED, cycle_pb2.GATE_DECISION_KEPT_INCUMBENT
    run.merged(1, gate=accepted, state=ref("1"), losses=losses(3.0, 2.5), merged=["UA", "UB"], weights=[0.5, 0.5])
    run.scored(copy, cycle=2)
    run.merged(2, gate=kept, state=ref("1"), losses=losses(2.5, 2.5))
    return run.ended(final_version=2)


@pytest.fixture
def pairs() -> Pairs:
    return [(fact.key, fact.message) for fact in finished_run().log]


@pytest.fixture
def finished() -> RunFacts:
    return finished_run().facts


@pytest.fixture
def rebuild() -> Callable[[Pairs], RunFacts]:
    def build(pairs: Pairs) -> RunFacts:
        facts = RunFacts("run-1")
        for sequence, (key, message) in enumerate(pairs, start=1):
            facts.add(Fact("run-1", key, message, "UX", "RUNS", sequence, START + sequence))
        return facts

    return build
