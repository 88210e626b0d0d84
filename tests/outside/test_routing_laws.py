"""Routing as each family of transformers computes it: modes and fewer experts a token, against the family's own models."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from connito.errors import Invalid
from connito.moe.layout import require_moe_layers
from connito.moe.resident import compress

from tests.support.families import FAMILIES, TABLES, logits, tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

EXPERTS = 6
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
# What a family can also be, by its configuration.
CASES: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "deepseek_v2, groups": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2}),
    "deepseek_v3, groups": ("deepseek_v3", {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5}),
    "deepseek_v3, weights as they are": ("deepseek_v3", {"norm_topk_prob": False}),
    "axk2, groups": ("axk2", {"n_group": 3, "topk_group": 2}),
    "cohere2_moe, sigmoid": ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}),
    "qwen3_moe, normalised": ("qwen3_moe", {"norm_topk_prob": True}),
    "lfm2_moe, without bias": ("lfm2_moe", {"use_expert_bias": False}),
    "deepseek_v4, learned": ("deepseek_v4", {"mlp_layer_types": ["moe", "moe"]}),
}
# Their tokens go to a fixed number of experts: zaya's to one, phimoe's to two, chosen one after the other.
FIXED = {"zaya": 1, "phimoe": 2}
# These choose by softmax and a bias: with fewer experts, shares grow and biases do not.
BIASED_SHARES = {"ernie4_5_moe"}


@functools.cache
def model_of(case: str, top_k: int = 3, experts: int = EXPERTS) -> Any:
    family, changes = CASES[case]
    sizes = dict.fromkeys(COUNTS, experts) | dict.fromkeys(PER_TOKEN, FIXED.get(family, top_k))
    return tiny_model(family, buffers=True, **sizes, **changes)


def resident(model: Any, mode: str, here: list[int], top_k: int = 0) -> Any:
    """The training model of which `here` is in memory in every layer, the first as target."""
    layers = require_moe_layers(model)
    helpers = dict.fromkeys(layers, here[1:])
    return compress(copy.deepcopy(model), dict.fromkeys(layers, here[:1]), helpers, mode, top_k=top_k)


@pytest.mark.parametrize("mode", ["natural", "masked", "restricted"])
@pytest.mark.parametrize("case", CASES)
def test_with_every_expert_in_memory_a_mode_is_the_full_model(case: str, mode: str) -> None:
    model = model_of(case)
    if case in TABLES and mode != "natural":
        with pytest.raises(Invalid, match=r"HashRouter does not choose experts by a top-k"):
            logits(resident(model, mode, list(range(EXPERTS))))
        return
    torch.testing.assert_close(logits(resident(model, mode, list(range(EXPERTS)))), logits(model), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("case", [case for case in CASES if case not in FIXED])
def test_fewer_experts_a_token_are_the_family_s_own_model_with_fewer(case: str, top_k: int) -> None:
    model = model_of(case)
    thin = resident(model, "natural", list(range(EXPERTS)), top_k)
    if case in TABLES:
        with pytest.raises(Invalid, match="HashRouter"):
            logits(thin)
        return
    own = copy.deepcopy(model_of(case, top_k))
    own.load_state_dict(model.state_dict())
    assert not torch.allclose(logits(own), logits(model), atol=1e-3)
    torch.testing.assert_close(logits(thin), logits(own), rtol=1e-5, atol=5e-6)


def test_a_family_of_which_no_fewer_can_be_asked_is_refused_by_name() -> None:
    with pytest.raises(Invalid, match="PhimoeTopKRouter does not choose experts by a top-k"):
        logits(resident(model_of("phimoe"), "natural", list(range(EXPERTS)), 1))


@pytest.mark.parametrize("mode", ["masked", "restricted"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in TABLES | set(FIXED)])
def test_tokens_whose_experts_are_all_there_are_routed_as_in_the_full_model(case: str, mode: str) -> None:
    """In the lowest layer, where both see the same hidden states; `masked` keeps their weights too."""
    model = model_of(case)
    weights, ids = chosen(model, model)
    used = torch.bincount(ids.flatten(), minlength=EXPERTS)
    rarest = int(used.where(used > 0, used.max() + 1).argmin())
    here = [expert for expert in range(EXPERTS) if expert != rarest]
    inside = (ids != rarest).all(dim=-1)
    assert inside.any()
    assert not inside.all()
    new_weights, new_ids = chosen(resident(model, mode, here), model)
    assert not (new_ids == rarest).any()
    if "groups" in case or (case in BIASED_SHARES and mode == "restricted"):
        return  # an absent expert may have decided which groups were open, or how much its share weighs beside a bias
    assert torch.equal(ids[inside].sort(-1).values, new_ids[inside].sort(-1).values)
    share = new_weights[inside].sort(-1).values / weights[inside].sort(-1).values
    torch.testing.assert_close(share, share[:, :1].expand_as(share), rtol=1e-5, atol=0, equal_nan=True)
    if mode == "masked":
        torch.testing.assert_close(share.nan_to_num(1.0), torch.ones_like(share), rtol=1e-5, atol=1e-6)


def chosen(model: Any, full: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights and expert ids, [T, k], in the lowest layer."""
    layers = require_moe_layers(full)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    router = model.get_submodule(layers[min(layers)].router_name)
    handle = router.register_forward_hook(lambda _m, _a, out: seen.append(out[1:3]))
    logits(model)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("mode", ["masked", "restricted"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in TABLES | set(FIXED)])
def test_fewer_experts_in_memory_than_slots_fill_all_slots_there_are(case: str, mode: str) -> None:
    thin = resident(model_of(case), mode, [2])
    for parameter in thin.parameters():
        assert torch.isfinite(parameter).all()
    out = thin(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    out.square().mean().backward()
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(p.grad).all() for p in thin.parameters() if p.grad is not None)
