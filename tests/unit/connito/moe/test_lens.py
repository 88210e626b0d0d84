"""Early decoding, against the model's own hidden states and a layer computed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from connito.moe.lens import early_decoding

from tests.support.families import FAMILIES, IDS, tiny_model


def test_it_is_what_the_model_would_say_if_it_ended_there() -> None:
    """Mixtral: the layer's residual, each token's first expert at the whole gate weight, the last norm, the output layer."""
    model: Any = tiny_model("mixtral")
    found = early_decoding(model, IDS.numpy())
    assert list(found) == ["0", "1"]
    for index in (0, 1):
        layer = model.model.layers[index]
        seen: dict[str, torch.Tensor] = {}
        handles = [
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, a: seen.update(residual=a[0])),  # noqa: B023
            layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: seen.update(x=out)),  # noqa: B023
        ]
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        for handle in handles:
            handle.remove()
        x, experts = seen["x"].reshape(-1, 32), layer.mlp.experts
        gates = (x @ layer.mlp.gate.weight.T).softmax(-1).topk(2, dim=-1)

        def mlp(expert: int, token: torch.Tensor, bank: Any = experts) -> torch.Tensor:
            gate, up = (bank.gate_up_proj[expert] @ token).chunk(2)
            out: torch.Tensor = bank.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            return out

        with torch.no_grad():
            shares = gates.values / gates.values.sum(-1, keepdim=True)
            both = torch.stack(
                [sum(shares[t, k] * mlp(int(gates.indices[t, k]), x[t]) for k in (0, 1)) for t in range(len(x))]
            )
            first = torch.stack([mlp(int(gates.indices[t, 0]), x[t]) for t in range(len(x))])
            whole, alone = (seen["residual"].reshape(-1, 32) + out for out in (both, first))
            p, q = (model.lm_head(model.model.norm(states)).log_softmax(-1) for states in (whole, alone))
        row = found[str(index)]
        assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(whole, alone).mean()), abs=1e-4)
        assert row["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
        assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_looked_into(family: str) -> None:
    found = early_decoding(tiny_model(family, buffers=True), IDS.numpy())
    assert found
    assert all(-1.0001 <= row["cosine"] <= 1.0001 for row in found.values())
