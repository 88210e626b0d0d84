"""Experts left out of, and put beside, those of every family; and FlexOlmo's joined layer by its formula."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.tiny import tokenizer
from connito.errors import Invalid
from connito.experts.flex import Addition, NewRows, grow, opt_in, opt_out
from connito.experts.prune import masked, prune
from connito.moe.layout import require_moe_layers
from connito.moe.rows import fingerprint

from tests.support.families import FAMILIES, IDS, TABLES, logits, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of transformers, about missing kernels

TEXT = np.concatenate([IDS.numpy(), IDS[:, :1].numpy()], axis=1).astype("int32")
SINGLE = [family for family in FAMILIES if family not in TABLES]


def additions(model: Any, count: int = 2) -> list[Addition]:
    texts = (TEXT, np.flip(TEXT, axis=1).copy())
    return [grow(model, f"owner-{n}", np.stack([texts[n]] * 3), TEXT[:, :-1], learning_rate=1e-2) for n in range(count)]


@pytest.mark.parametrize("family", SINGLE)
def test_an_expert_left_out_is_an_expert_that_nothing_is_sent_to(family: str) -> None:
    model = tiny_model(family, buffers=True)
    keep = {index: [0, 2, 3] for index in require_moe_layers(model)}
    with masked(model, keep):
        seen = logits(model)
    assert not torch.equal(seen, logits(model))
    torch.testing.assert_close(logits(prune(model, keep)), seen, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", SINGLE)
def test_additions_join_in_any_order_and_leave_no_trace(family: str) -> None:
    model = tiny_model(family, buffers=True)
    before, plain = fingerprint(model), logits(model)
    one, other = additions(model)
    assert fingerprint(model) == before, "growing touched the anchor"
    joined, turned = copy.deepcopy(model), copy.deepcopy(model)
    ids = opt_in(joined, [one, other])
    assert ids == opt_in(turned, [other, one])
    assert torch.equal(logits(joined), logits(turned))
    assert not torch.equal(logits(joined), plain)
    opt_out(joined, ids, [one.name])
    alone = copy.deepcopy(model)
    opt_in(alone, [other])
    assert torch.equal(logits(joined), logits(alone))
    opt_out(turned, ids, [one.name, other.name])
    assert torch.equal(logits(turned), plain)
    assert fingerprint(turned) == before


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "minimax_m2", "qwen3_moe"])
def test_a_joined_model_is_one_that_transformers_loads(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(family, buffers=True)
    opt_in(model, additions(model))
    save_checkpoint(model, tmp_path / "joined", tokenizer())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "joined", experts_implementation="eager").eval()
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


ODD = [
    ("qwen2_moe", {"tie_word_embeddings": True, "mlp_only_layers": [0], "shared_expert_intermediate_size": 24}),
    ("deepseek_v3", {"tie_word_embeddings": True, "first_k_dense_replace": 1, "n_shared_experts": 2}),
    ("glm4_moe", {"first_k_dense_replace": 1, "n_shared_experts": 1, "attention_bias": True}),
    ("qwen3_moe", {"tie_word_embeddings": True, "decoder_sparse_step": 2}),
]


@pytest.mark.parametrize(("family", "changes"), ODD, ids=[family for family, _ in ODD])
def test_odd_checkpoints_are_pruned_and_grown_as_transformers_loads_them(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Tied words, dense layers between or before, several shared experts: what is written is the same function elsewhere."""
    from transformers import AutoModelForCausalLM

    model = tiny_model(family, buffers=True, **changes)
    keep = {index: [0, 2, 3] for index in require_moe_layers(model)}
    assert len(keep) < model.config.num_hidden_layers
    grown, pruned = copy.deepcopy(model), prune(copy.deepcopy(model), keep)
    opt_in(grown, additions(model))
    for name, made in {"pruned": pruned, "grown": grown}.items():
        save_checkpoint(made, tmp_path / name, tokenizer())
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name, experts_implementation="eager").eval()
        torch.testing.assert_close(logits(again), logits(made), rtol=1e-5, atol=1e-6)
        assert not torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_router_rows_learn_and_the_anchors_do_not(family: str) -> None:
    model = tiny_model(family, buffers=True)
    anchor = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [grow(model, "one", np.stack([TEXT] * steps), TEXT[:, :-1], learning_rate=1e-2).rows for steps in (1, 6)]
    moved = [float((rows[1][i]["router.weight"] - rows[0][i]["router.weight"]).abs().max()) for i in rows[0]]
    assert max(moved) > 1e-3
    assert all(torch.equal(tensor, anchor[name]) for name, tensor in model.state_dict().items())


def test_a_table_of_ids_has_no_place_for_another() -> None:
    model = tiny_model("deepseek_v4", buffers=True)
    with pytest.raises(Invalid, match="table of their ids"):
        additions(model, 1)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_the_joined_layer_is_flexolmos(family: str) -> None:
    """Scores over anchor and additions together, the best k, each expert's gated MLP: written out from the formula."""
    model = tiny_model(family, buffers=True)
    opt_in(model, additions(model))
    layer: Any = next(iter(require_moe_layers(model).values()))
    block, x = layer.block, torch.randn(7, 32, generator=torch.Generator().manual_seed(5))
    assert layer.num_experts == 6
    with torch.no_grad():
        out = block(x[None])
        found = (out[0] if isinstance(out, tuple) else out).reshape(7, 32)
        scores = x @ layer.router.weight.T
        if family == "mixtral":
            gates = scores.softmax(-1)
            chosen = gates.topk(2).indices
        else:
            gates = scores.sigmoid()
            chosen = (gates + layer.router.e_score_correction_bias).topk(2).indices
        weights = gates.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True)
        if family == "deepseek_v3":
            weights = weights * model.config.routed_scaling_factor
        want = torch.zeros_like(x)
        for token in range(7):
            for slot in range(2):
                gate, up = (layer.experts.gate_up_proj[chosen[token, slot]] @ x[token]).chunk(2)
                mlp = layer.experts.down_proj[chosen[token, slot]] @ (torch.nn.functional.silu(gate) * up)
                want[token] += weights[token, slot] * mlp
        if family == "deepseek_v3":
            want = want + block.shared_experts(x)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral"])
def test_the_new_row_is_trained_against_an_anchor_that_stands_still(family: str) -> None:
    model = tiny_model(family, buffers=True)
    opt_in(model, additions(model, 1))
    rows = NewRows(require_moe_layers(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows.open()
    for step in range(2):
        rows.begin(step, 2)
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        rows.step(1e-2)
    for name, tensor in model.state_dict().items():
        moved = (tensor != before[name]).nonzero()
        assert not len(moved) or (
            name.endswith(("gate.weight", "router.weight", "router.bias")) and set(moved[:, 0].tolist()) == {4}
        )
    learnt = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert learnt, "nothing learnt: the test shows nothing"
