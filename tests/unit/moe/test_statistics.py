from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from connito.errors import Invalid
from connito.moe.statistics import RoutingStatistics, collect


def test_counts_add_up_and_survive_storage(full: Any, sequences: Any) -> None:
    text = sequences("recipes", 6, 3)[:, :-1]
    whole = collect(full, text)
    halves = collect(full, text[:2]).merge(collect(full, [text[2:5], text[5:]]))
    for index, layer in whole.layers.items():
        other = halves.layers[index]
        assert layer.tokens == other.tokens == text.size
        assert layer.token_score.sum() == pytest.approx(1.0)
        np.testing.assert_array_equal(layer.counts, other.counts)
        np.testing.assert_array_equal(layer.counts, layer.together.diagonal())
        np.testing.assert_allclose(layer.gate_sums, other.gate_sums)
        # norm_topk_prob: every token gives away exactly one.
        assert layer.gate_sums.sum() == pytest.approx(text.size, rel=1e-5)
        assert layer.first.sum() == text.size
    again = RoutingStatistics.from_bytes(whole.to_bytes())
    assert again.to_bytes() == whole.to_bytes()
    assert again.layers.keys() == whole.layers.keys()


def test_the_tiny_base_routes_by_domain(full: Any, sequences: Any) -> None:
    recipes, ledgers = (collect(full, sequences(d, 8, 5)[:, :-1]) for d in ("recipes", "ledgers"))
    for index in recipes.layers:
        mine, theirs = recipes.layers[index].token_score, ledgers.layers[index].token_score
        assert np.minimum(mine, theirs).sum() < 0.5, "half of the routing is the same"


def test_dense_models_and_empty_probes_are_refused(full: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    dense = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(Invalid, match="dense model"):
        collect(dense, np.zeros((1, 4), dtype=np.int32))
    with pytest.raises(Invalid, match="probe text is empty"):
        collect(full, np.zeros((0, 4), dtype=np.int32))
    assert not any(module._forward_hooks for module in full.modules() if isinstance(module, torch.nn.Module))


def test_statistics_of_different_models_do_not_merge() -> None:
    small, large = RoutingStatistics(), RoutingStatistics()
    small.add(0, 2, np.array([[0]]), np.array([[1.0]]))
    large.add(0, 3, np.array([[0]]), np.array([[1.0]]))
    with pytest.raises(Invalid, match="different models"):
        small.merge(large)
