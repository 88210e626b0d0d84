from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from connito.data.packing import PADDING, ROW
from connito.errors import Invalid
from connito.moe.layout import require_moe_layers
from connito.moe.statistics import RoutingStatistics, collect, merge_all


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


def test_batches_side_by_side_count_what_one_after_the_other_does(full: Any, sequences: Any, threads: int) -> None:
    tokens, met = sequences("logs", 9, 1), threading.Barrier(threads)
    text = np.zeros(tokens.shape, ROW)
    text["token"], text["counts"] = tokens, True
    # The more text, the later the row.
    positions, rows = np.arange(tokens.shape[1]), np.arange(len(tokens))[:, None]
    text["position"] = np.where(positions < 8 * (rows + 1), positions, PADDING)
    torch.set_num_threads(1)
    alone, began = collect(full, text, batch_tokens=64), set[int]()
    torch.set_num_threads(threads)

    def arrive(*_: Any) -> None:
        if (me := threading.get_ident()) not in began:
            began.add(me)
            met.wait(60)

    handle = full.get_submodule("model.layers.0.mlp").register_forward_pre_hook(arrive)
    assert collect(full, text, batch_tokens=64).to_bytes() == alone.to_bytes()
    handle.remove()
    assert len(began) == threads


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


def test_shards_merge_to_the_same_bytes_in_any_order() -> None:
    rng = np.random.default_rng(0)
    parts = []
    for number in range(4):
        part = RoutingStatistics(probes=(f"{number}" * 64,), routers="r")
        for layer in (3, 1):
            ids = rng.permuted(np.tile(np.arange(8), (50, 1)), axis=1)[:, :2]
            part.add(layer, 8, ids, rng.random((50, 2), dtype=np.float32) * 2.5)
        parts.append(part)
    forward, backward = merge_all(parts), merge_all([parts[2].merge(parts[3]), parts[1], parts[0]])
    assert forward.to_bytes() == backward.to_bytes()
    assert forward.probes == tuple(f"{n}" * 64 for n in range(4))
    assert forward.tokens == 200


def test_text_is_known_by_its_digest_and_counts_once(full: Any, sequences: Any) -> None:
    text = sequences("recipes", 4, 3)[:, :-1]
    first, second = collect(full, text[:2]), collect(full, iter([text[2:]]))
    assert first.probes != second.probes
    assert collect(full, text[:2]).probes == first.probes
    assert RoutingStatistics.from_bytes(first.to_bytes()).probes == first.probes
    with pytest.raises(Invalid, match="would count twice"):
        first.merge(collect(full, text[:2]))


def test_statistics_know_the_routers_they_came_from(full: Any, sequences: Any) -> None:
    text = sequences("recipes", 2, 3)[:, :-1]
    before = collect(full, text)
    layer = next(iter(require_moe_layers(full).values()))
    bank: Any = layer.experts.down_proj
    with torch.no_grad():
        bank.mul_(1.1)
    assert collect(full, text).routers == before.routers, "training experts does not change who chooses"
    with torch.no_grad():
        next(layer.router.parameters()).mul_(1.1)
    with pytest.raises(Invalid, match="different models"):
        before.merge(collect(full, sequences("logs", 2, 3)[:, :-1]))


def test_other_files_are_not_statistics() -> None:
    for data in (b"", b"nothing", b"\x02\0\0\0\0\0\0\0{}"):
        if data.endswith(b"{}"):
            assert RoutingStatistics.from_bytes(data).tokens == 0
            continue
        with pytest.raises(Invalid, match="--save-statistics"):
            RoutingStatistics.from_bytes(data)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(Invalid, match="not finite"):
        RoutingStatistics().add(0, 2, np.array([[0]]), np.array([[np.nan]]))
