"""MoE models with random weights, for what does not depend on weights: time, memory, arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Qwen2-MoE without shared expert. The first `dense_layers` of `layers` have no experts."""

    layers: int
    dense_layers: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    vocabulary: int
    heads: int = 4
    kv_heads: int = 2


WIDE = Shape(layers=6, dense_layers=0, hidden=256, intermediate=256, experts=16, top_k=4, vocabulary=2048)
# The demo base's proportions (24 dense layers below 6 MoE layers), and the demo base's own shape.
DEEP = Shape(layers=30, dense_layers=24, hidden=128, intermediate=320, experts=8, top_k=2, vocabulary=2048)
DEMO = Shape(30, 24, 576, 1536, 8, 2, 49152, heads=9, kv_heads=3)


def build(shape: Shape, seed: int = 0) -> Any:
    """Return a frozen model in eval mode; the family's own loop over experts, so that every multiplication can be
    counted.
    """
    import torch
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        moe_intermediate_size=shape.intermediate,
        shared_expert_intermediate_size=1,
        num_hidden_layers=shape.layers,
        mlp_only_layers=list(range(shape.dense_layers)),
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        qkv_bias=False,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("eager")
    return model.requires_grad_(False).eval()


def copies(model: Any) -> Callable[[], Any]:
    """Return a function that gives a fresh copy of `model` each time."""
    return lambda: copy.deepcopy(model)


def from_config(family: str, settings: Mapping[str, Any]) -> Any:
    """Return the modules of a published model from its configuration alone: parameters have shapes and no memory."""
    from connito.base.pretrained import modules_of
    from transformers import AutoConfig

    return modules_of(AutoConfig.for_model(family, **settings))
