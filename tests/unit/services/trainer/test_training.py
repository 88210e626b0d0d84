"""What a miner takes from one cycle to the next, and from the policy."""

from __future__ import annotations

from pathlib import Path

import torch
from connito.moe.moments import Moment, Moments
from connito.v1.run_pb2 import RunSpec, TrainPolicy

from services.trainer.training import OptimizerState, schedule_of


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
