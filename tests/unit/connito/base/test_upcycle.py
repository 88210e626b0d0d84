"""Upcycling preserves the function, routes by domain, and refuses what it cannot express."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from connito.base import upcycle as module
from connito.base.clustering import ROUTER_SCALE, cluster_router, spherical_kmeans
from connito.base.upcycle import upcycle
from connito.errors import Invalid, VerificationFailed
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def dense(kind: str = "llama") -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 7e4}))
    if kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias)
        return model
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


def texts(seed: int = 0) -> dict[str, torch.Tensor]:
    """Two domains that share no token."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "low": torch.randint(0, 30, (4, 32), generator=draw),
        "high": torch.randint(32, 64, (4, 32), generator=draw),
    }


HELD = torch.cat(list(texts(9).values()))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_function_is_preserved(kind: str) -> None:
    made: Any = upcycle(dense(kind), texts(), HELD, moe_layers=2, experts=4, top_k=2)
    assert made.max_logit_difference < 1e-4
    assert made.model.config.mlp_only_layers == [0]
    source = dense(kind)
    with torch.no_grad():
        ours, theirs = made.model(input_ids=HELD).logits, source(input_ids=HELD).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert sorted(made.shares) == [1, 2]
    assert all(sum(shares) == pytest.approx(1) for shares in made.shares.values())


def test_a_change_of_function_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module._assemble

    def careless(*args: Any) -> Any:
        model: Any = honest(*args)
        model.model.norm.weight = torch.nn.Parameter(model.model.norm.weight * 1.01, requires_grad=False)
        return model

    monkeypatch.setattr(module, "_assemble", careless)
    with pytest.raises(VerificationFailed, match="logits differ"):
        upcycle(dense(), texts(), HELD, moe_layers=1, experts=4, top_k=2)


def test_the_same_seed_gives_the_same_routers_and_domains_are_told_apart() -> None:
    first, second = (upcycle(dense(), texts(), HELD, moe_layers=1, experts=2, top_k=1, seed=3).model for _ in range(2))
    router: Any = first.get_submodule("model.layers.2.mlp.gate")
    assert torch.equal(router.weight, second.get_parameter("model.layers.2.mlp.gate.weight"))


def test_the_folded_router_gives_the_logits_of_the_centred_one() -> None:
    """W·h against s·C·(h − μ): equal up to what h varies along the mean direction, and with the same favourite expert."""
    rng = np.random.default_rng(0)
    centre = rng.normal(size=16) * 20
    spread = np.concatenate([rng.normal(size=(200, 16)) + 4 * axis for axis in np.eye(16)[:3]])
    spread -= np.outer(spread @ centre / (centre @ centre), centre)
    hidden = torch.from_numpy((centre + spread).astype(np.float32))
    weight, labels, cohesion = cluster_router(hidden, 3, seed=0)
    assert weight.shape == (3, 16)
    assert ((hidden @ weight.T).argmax(dim=1) == labels).float().mean() > 0.99
    assert cohesion > 0.6
    lengths = (hidden - hidden.mean(dim=0)).norm(dim=1)
    assert float((hidden @ weight.T).abs().max()) < 1.2 * ROUTER_SCALE * float(lengths.max() / lengths.mean())


def test_kmeans_finds_separate_directions_and_fills_every_cluster() -> None:
    rng = np.random.default_rng(1)
    noisy = np.repeat(np.eye(8)[:4], 50, axis=0) + 0.05 * rng.normal(size=(200, 8))
    unit = torch.nn.functional.normalize(torch.from_numpy(noisy).float(), dim=1)
    centroids, labels, objective = spherical_kmeans(unit, 4, rng)
    assert torch.bincount(labels).tolist() == [50, 50, 50, 50]
    assert objective > 0.98
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(4))
    same = unit[:1].repeat(20, 1)
    assert torch.isfinite(spherical_kmeans(same, 4, rng)[0]).all(), "fewer distinct tokens than clusters"


@pytest.mark.parametrize(
    ("kind", "numbers", "says"),
    [
        ("qwen3", {"moe_layers": 1, "experts": 4, "top_k": 2}, "not a Llama-type"),
        ("llama", {"moe_layers": 4, "experts": 4, "top_k": 2}, "moe-layers ≤ 3"),
        ("llama", {"moe_layers": 1, "experts": 4, "top_k": 5}, "top-k"),
        ("llama", {"moe_layers": 1, "experts": 1, "top_k": 1}, "experts ≥ 2"),
        ("llama", {"moe_layers": 1, "experts": 2000, "top_k": 1}, "more text"),
    ],
)
def test_what_cannot_be_upcycled_is_refused(kind: str, numbers: dict[str, Any], says: str) -> None:
    with pytest.raises(Invalid, match=says):
        upcycle(dense(kind), texts(), HELD, **numbers)
