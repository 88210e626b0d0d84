"""Weights set to zero as MoE-Pruner scores them, in families that store experts in their own ways: written out anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from connito.experts.lowrank import sparsify
from connito.moe.layout import require_moe_layers
from connito.moe.router import choice

from tests.support.families import IDS, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore")


def clamped(hidden: torch.Tensor) -> torch.Tensor:
    """gpt-oss: gates and ups by turns, both clamped."""
    gate, up = hidden[..., ::2].clamp(max=7.0), hidden[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def silu(hidden: torch.Tensor) -> torch.Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize(("family", "gated", "turned"), [("gpt_oss", clamped, True), ("mixtral", silu, False)])
def test_the_lowest_of_every_output_row_go(family: str, gated: Any, turned: bool) -> None:
    """|W_ij| · ‖x_j · g‖ (eq. 6), the hidden values with the biases that the family adds."""
    model = tiny_model(family)
    layer: Any = require_moe_layers(model)[0]
    seen: list[Any] = []
    hooks = [
        layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]))),
        layer.router.register_forward_hook(lambda _, __, output: seen.append(choice(output)[1:3])),
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for hook in hooks:
        hook.remove()
    x = next(each for each in seen if isinstance(each, torch.Tensor))
    weights, ids = next(each for each in seen if not isinstance(each, torch.Tensor))
    before = {name: getattr(layer.experts, name).detach().clone() for name in ("gate_up_proj", "down_proj")}
    sparsify(model, IDS.numpy().astype("int32"), 0.5)
    for expert in range(layer.num_experts):
        token, slot = torch.where(ids.reshape(len(x), -1) == expert)
        assert len(token), "an expert without a token: the test shows nothing"
        inputs, gate = x[token], weights.reshape(len(x), -1)[token, slot][:, None]
        for name in ("gate_up_proj", "down_proj"):
            old, new = (
                bank[expert].T if turned else bank[expert] for bank in (before[name], getattr(layer.experts, name))
            )
            scores = old.abs() * (inputs * gate).norm(dim=0)
            want = torch.where(scores > scores.sort(dim=-1).values[:, [old.shape[1] // 2 - 1]], old, 0.0)
            assert torch.equal(new, want)
            bias = getattr(layer.experts, f"{name}_bias", None)
            inputs = gated(inputs @ new.T + (0 if bias is None else bias[expert])) if name == "gate_up_proj" else inputs
