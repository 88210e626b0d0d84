"""Fewer experts a token, written out from the published formulas on Mixtral; and experts that choose their tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from connito.errors import Invalid
from connito.experts.token_skipping import experts_choose, skip_thresholds, skipping
from connito.moe.layout import require_moe_layers

from tests.support.families import IDS, tiny_model


def mlp(bank: Any, expert: int, token: torch.Tensor) -> torch.Tensor:
    gate, up = (bank.gate_up_proj[expert] @ token).chunk(2)
    out: torch.Tensor = bank.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
    return out


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
def test_naee_skips_the_second_expert_below_beta_and_shares_out_anew(beta: float) -> None:
    """Softmax over all, the best two, the second dropped where w₂ < β·w₁, what is left divided by its sum."""
    model = tiny_model("mixtral")
    layer: Any = next(iter(require_moe_layers(model).values()))
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad(), skipping(model, beta) as count:
        out = layer.block(x[None])
        found = (out[0] if isinstance(out, tuple) else out).reshape(9, 32)
        dropped = 0
        for token in range(9):
            best = (layer.router.weight @ x[token]).softmax(-1).topk(2)
            weights = best.values.clone()
            if weights[1] < beta * weights[0]:
                weights[1], dropped = 0.0, dropped + 1
            weights = weights / weights.sum()
            want = sum(weights[k] * mlp(layer.experts, int(best.indices[k]), x[token]) for k in (0, 1))
            torch.testing.assert_close(found[token], want, rtol=1e-4, atol=1e-5)
    assert (count.skipped, count.slots) == (dropped, 18)


def test_thresholds_are_the_medians_of_the_second_weight_over_the_first() -> None:
    model = tiny_model("mixtral")
    layers, seen = require_moe_layers(model), {}
    handles = [
        layer.router.register_forward_pre_hook(lambda _, a, index=index: seen.update({index: a[0].reshape(-1, 32)}))
        for index, layer in layers.items()
    ]
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, beta in skip_thresholds(model, IDS.numpy()).items():
        router: Any = layers[index].router
        best = (seen[index] @ router.weight.T).softmax(-1).topk(2, dim=-1).values
        assert beta == pytest.approx(float(np.median((best[:, 1] / best[:, 0]).detach().numpy())), rel=1e-5)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0])
def test_every_expert_takes_the_tokens_that_score_it_best(capacity: float) -> None:
    """S = softmax(X W), each column's best T·c/N; x_out = Σ over experts that took the token of S·expert(x)."""
    model = tiny_model("mixtral")
    layer: Any = next(iter(require_moe_layers(model).values()))
    x = torch.randn(12, 32, generator=torch.Generator().manual_seed(6))
    with torch.no_grad(), experts_choose(model, capacity):
        out = layer.block(x[None])
        found = (out[0] if isinstance(out, tuple) else out).reshape(12, 32)
        scores, want = (x @ layer.router.weight.T).softmax(-1), torch.zeros(12, 32)
        for expert in range(4):
            order = sorted(range(12), key=lambda t: -float(scores[t, expert]))
            for token in order[: round(12 * capacity / 4)]:
                want[token] += scores[token, expert] * mlp(layer.experts, expert, x[token])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(Invalid, match="capacity"), experts_choose(model, 0.0):
        pass
