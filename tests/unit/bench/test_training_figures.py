"""The pieces that the figures on training rest on: same tokens, fair methods, counted models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from connito.protocol.policy.law import fill
from connito.v1.run_pb2 import RunSpec

from bench.decentralised import shards_of
from bench.decentralised_cells import DOMAINS
from bench.forgetting import frontier
from bench.merging import ARMS, Merge, merged
from bench.published_models import Assumed, count, rows
from bench.random_moe import DEEP, DEMO, Shape, build, copies
from bench.tiny_rig import Rig, batched, everything_else, mean_loss
from bench.training_methods import Loop, expert_only, full_fine_tuning, gradient_masking
from bench.validator_throughput import WAYS, _submissions, ceiling

torch = pytest.importorskip("torch")

SMALL = Shape(layers=3, dense_layers=1, hidden=16, intermediate=24, experts=4, top_k=2, vocabulary=64, heads=2)
TARGETS = {1: [0, 2], 2: [3]}


def tokens(count: int = 4, length: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SMALL.vocabulary, (count, length + 1), dtype=np.int32)


def test_iid_and_non_iid_hold_the_same_sequences_and_non_iid_miners_see_one_domain() -> None:
    rig = Rig(0, Path("unused"))
    iid, apart = (shards_of(rig, 4, 2, iid=kind, total=4, batch=2) for kind in (True, False))
    width = iid.shape[-1]
    assert iid.shape == apart.shape == (2, 4, 2, 2, width)
    assert sorted(map(bytes, iid.reshape(-1, width))) == sorted(map(bytes, apart.reshape(-1, width)))
    for miner, domain in enumerate(DOMAINS):
        own = {bytes(row) for row in rig.train(domain, 8)}
        assert {bytes(row) for row in apart[:, miner].reshape(-1, width)} == own


def test_merging_is_what_a_run_does_with_the_policy_of_its_arm() -> None:
    theta = {"layers.1.down_proj": np.zeros((1, 2), np.float32)}
    states = [{"layers.1.down_proj": torch.tensor([[1.0, 3.0]])}, {"layers.1.down_proj": torch.tensor([[3.0, 1.0]])}]
    mean, _ = merged(Merge("mean", "whole", 1.0, 0.0), theta, None, states, [1.0, 2.0])
    best, _ = merged(Merge("top-1", "whole", 1.0, 0.0), theta, None, states, [1.0, 2.0])
    tokens, _ = merged(Merge("mean", "tokens", 1.0, 0.0), theta, None, states, [1.0, 1.0], [{1: [30]}, {1: [10]}])
    assert np.allclose(mean["layers.1.down_proj"], 2.0)
    assert np.allclose(best["layers.1.down_proj"], [[3.0, 1.0]])
    assert np.allclose(tokens["layers.1.down_proj"], [[1.5, 2.5]])


def test_one_arm_is_the_policy_of_a_run_that_says_nothing() -> None:
    spec = RunSpec()
    fill(spec)
    policy, default = spec.merging, ARMS["default"].merge
    assert (default.aggregator, default.weighting) == (policy.aggregator, policy.weighting)
    assert (default.rate, default.momentum) == (policy.outer_learning_rate, policy.outer_momentum)


def test_the_frontier_leaves_out_what_another_point_beats() -> None:
    def point(target: float, general: float) -> dict[str, list[float]]:
        return {"target": [target] * 3, "general": [general] * 3}

    kept = frontier([point(-0.3, 0.1), point(-0.2, 0.2), point(-0.1, 0.0), point(-0.5, 0.4)])
    assert [p["general"][0] for p in kept] == [0.0, 0.1, 0.4]


def test_masking_moves_selected_rows_only_through_the_gradient_and_keeps_moments_for_the_bank() -> None:
    load = copies(build(SMALL))
    masked = Loop(gradient_masking(load, TARGETS), 1e-2, weight_decay=0.0)
    lean = Loop(expert_only(load, TARGETS, everything_else(TARGETS, 4)), 1e-2, weight_decay=0.0)
    for loop in (masked, lean):
        loop.step(tokens())
    a, b = mean_loss(masked.job.full(), tokens()), mean_loss(lean.job.full(), tokens())
    assert a == pytest.approx(b, abs=1e-5)  # clipping sees the same gradients, so the two are one method
    assert masked.job.upload() == lean.job.upload()
    assert masked.state_bytes() > 2 * lean.state_bytes()


def test_weight_decay_moves_unselected_rows_under_masking() -> None:
    model = build(SMALL)
    masked = Loop(gradient_masking(copies(model), TARGETS), 1e-2, weight_decay=0.1)
    masked.step(tokens())
    bank = masked.job.model.get_parameter("model.layers.1.mlp.experts.down_proj")
    before = model.get_parameter("model.layers.1.mlp.experts.down_proj")
    assert not torch.equal(bank[1], before[1])


def test_full_fine_tuning_trains_and_uploads_everything() -> None:
    model = build(SMALL)
    job = full_fine_tuning(copies(model))
    assert job.upload() == 4 * sum(parameter.numel() for parameter in model.parameters())
    loop = Loop(job, 1e-2)
    assert loop.step(tokens()) > loop.step(tokens())


@pytest.mark.parametrize(
    ("name", "billions"), [("DeepSeek-V2-Lite", 15.7), ("OLMoE-1B-7B", 6.92), ("Qwen3-30B-A3B", 30.5)]
)
def test_published_models_have_the_published_size(name: str, billions: float) -> None:
    assert count(name).total / 1e9 == pytest.approx(billions, rel=0.005)


def test_expert_only_rows_are_cheaper_in_all_three_claims() -> None:
    lean, whole, masked, _ = rows("OLMoE-1B-7B", Assumed())
    for claim in ("upload_bytes", "resident_bytes", "flops"):
        assert lean[claim] < whole[claim]
    assert lean["upload_bytes"] == masked["upload_bytes"]
    assert masked["resident_bytes"] > 2 * lean["resident_bytes"]


def test_every_way_of_scoring_gives_the_same_losses(tmp_path: Path) -> None:
    model = build(SMALL)
    files = _submissions(model, TARGETS, tmp_path, 2, seed=0)
    first, *others = (score(model, TARGETS, files, tokens(3)) for score in WAYS.values())
    for losses in others:
        assert np.allclose(first, losses, atol=1e-4)


def test_batches_drop_the_rest() -> None:
    assert batched(tokens(5), 2).shape == (2, 2, 9)


def test_a_cache_cannot_save_what_lies_above_the_first_adapted_layer() -> None:
    assert ceiling(DEEP) == pytest.approx(3.03, abs=0.05)
    assert ceiling(DEMO) == pytest.approx(2.30, abs=0.05)
