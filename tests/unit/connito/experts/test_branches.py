"""Specialists joined: their identities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from connito.base.branches import import_branches
from connito.errors import Invalid
from connito.moe.layout import find_moe_layers
from connito.moe.statistics import collect
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.models import Sequences


@pytest.fixture
def dense() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
                         num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=256)  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def texts(sequences: Sequences) -> dict[str, torch.Tensor]:
    return {
        domain: torch.from_numpy(sequences(domain, 6, 60)[:, :-1].astype("int64"))
        for domain in ("recipes", "logs", "poems")
    }


def noisy(model: Any, seed: int) -> Any:
    out, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for parameter in out.parameters():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return out


def test_copies_of_one_branch_are_that_branch(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    moe = import_branches(dense, dict.fromkeys(texts, dense), texts, moe_layers=2)
    ids = texts["logs"][:2]
    difference = (moe(input_ids=ids).logits - dense(input_ids=ids).logits).abs().max()
    assert float(difference) < 1e-4


def test_experts_are_the_branches_mlps_and_the_rest_their_mean(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    branches = {domain: noisy(dense, seed) for seed, domain in enumerate(texts)}
    moe: Any = import_branches(dense, branches, texts, moe_layers=2)
    layers: Any = find_moe_layers(moe)
    assert sorted(layers) == [1, 2]
    for number, branch in enumerate(branches.values()):
        mlp = branch.model.layers[2].mlp
        assert torch.equal(layers[2].experts.down_proj[number], mlp.down_proj.weight)
        assert torch.equal(
            layers[2].experts.gate_up_proj[number], torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        )
    mean = torch.stack([b.model.layers[0].self_attn.q_proj.weight for b in branches.values()]).mean(dim=0)
    torch.testing.assert_close(moe.model.layers[0].self_attn.q_proj.weight, mean)


def test_tokens_of_a_domain_go_to_its_own_branch_first(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    moe = import_branches(dense, dict.fromkeys(texts, dense), texts, moe_layers=1)
    for number, domain in enumerate(texts):
        first = collect(moe, texts[domain].numpy()).layers[2].first
        assert int(first.argmax()) == number


def test_strangers_are_refused(dense: Any, texts: dict[str, torch.Tensor]) -> None:
    with pytest.raises(Invalid, match="text of its own"):
        import_branches(dense, {"recipes": dense, "maths": dense}, texts, moe_layers=1)
    config = copy.deepcopy(dense.config)
    config.intermediate_size = 64
    other = LlamaForCausalLM(config)
    with pytest.raises(Invalid, match="not branches of it"):
        import_branches(dense, {**dict.fromkeys(texts, dense), "logs": other}, texts, moe_layers=1)
