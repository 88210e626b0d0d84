"""What a miner takes from one cycle to the next, and from the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.description import build_manifest
from connito.errors import Invalid
from connito.moe.engine import Engine
from connito.moe.footprint import Workload
from connito.moe.four_bit import FourBit
from connito.moe.moments import Moment, Moments
from connito.v1.run_pb2 import LayerSelection, RunSpec, TrainPolicy
from connito.workloads.predicting import predictor

from services.trainer.base import Base
from services.trainer.settings import TrainerSettings
from services.trainer.training import OptimizerState, check_memory, schedule_of
from tests.support.run import RUN, Run


def test_moments_go_from_a_cycle_to_the_next_one_and_only_there(tmp_path: Path) -> None:
    for cycle in (1, 2, 3):
        (tmp_path / str(cycle)).mkdir()
    assert OptimizerState(tmp_path / "1").load(second_only=True) == Moments(second_only=True), "nothing was kept yet"
    name, ones = "layers.0.down_proj", torch.ones(4)
    made = Moments(4, {name: Moment(ones)}, {name: Moment(2 * ones)}, {name: torch.Size((2, 2))})
    OptimizerState(tmp_path / "1").save(made)
    kept = OptimizerState(tmp_path / "2").load(second_only=False)
    assert (kept.steps, kept.second_only) == (4, False)
    assert kept.shapes == made.shapes
    assert torch.equal(kept.second[name].values, 2 * ones)
    assert OptimizerState(tmp_path / "2").load(second_only=True).second_only
    assert OptimizerState(tmp_path / "3").load(second_only=True).steps == 0, "cycle 2 left nothing"
    (tmp_path / "2" / OptimizerState.NAME).write_bytes(b"torn by a power cut")
    assert OptimizerState(tmp_path / "3").load(second_only=True).steps == 0


def test_a_policy_without_a_schedule_keeps_its_rate() -> None:
    plain = schedule_of(RunSpec(cycles=3, training=TrainPolicy(local_steps=5)))
    assert {plain.factor(cycle, step) for cycle in (1, 2, 3) for step in range(5)} == {1.0}
    falling = schedule_of(RunSpec(cycles=3, training=TrainPolicy(local_steps=5, final_rate_share=0.1, warmup_steps=1)))
    assert falling.factor(1, 0) == 0.5
    assert falling.factor(3, 4) < 0.12


def test_a_miner_holds_the_best_that_its_memory_allows_and_loads_that(random_base: Path) -> None:
    spec = RunSpec(run=RUN, training=TrainPolicy(batch_sequences=2, sequence_length=16))
    facts = Run().created(spec).selected(layers=[LayerSelection(layer=1, experts=[1, 6], helpers=[0])]).facts
    manifest = build_manifest(random_base)
    base = Base(manifest, {path.name: path for path in random_base.iterdir()}, None)
    device, targets, helpers = torch.device("cpu"), {1: [1, 6]}, {1: [0]}
    predict = predictor(base.config(), targets, helpers)
    needs = {
        residency: predict(Workload(2, 16, residency=residency, packed=True)).total
        for residency in ("all", "four-bit", "helpers")
    }
    for given, memory, chosen in (
        ("auto", needs["all"], "all"),
        ("auto", needs["all"] - 1, "four-bit"),
        ("auto", needs["four-bit"], "four-bit"),
        ("helpers", needs["all"], "helpers"),
        ("four-bit", needs["all"], "four-bit"),
    ):
        work = check_memory(facts, base, device, settings(given, memory), Engine())
        assert work.residency == chosen, (given, memory)
        experts: Any = base.load(facts, device, work, {}).get_submodule("model.layers.1.mlp.experts")
        assert isinstance(experts.helper_down_proj, FourBit) == (chosen == "four-bit")
        assert len(experts.connito_where) == (3 if chosen == "helpers" else 8)
    with pytest.raises(Invalid, match=r"needs .* and CONNITO_MEMORY_BYTES has"):
        check_memory(facts, base, device, settings("auto", 1), Engine())
    with pytest.raises(Invalid, match="needs"):
        check_memory(facts, base, device, settings("all", needs["all"] - 1), Engine())


def settings(residency: str, memory: int) -> TrainerSettings:
    given = {"key_file": "k", "residency": residency, "memory_bytes": memory, "checkpointing": "off"}
    return TrainerSettings.model_validate(given)
