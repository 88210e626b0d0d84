"""Cost of expert-only training on published models, counted from their configurations; no weight is loaded.

Assumed, and stated with the result: weights and gradients in bfloat16, two fp32 AdamW moments per trained
parameter, no fp32 master copy, no activations; multiplications per token counted as two per weight used, attention
scores left out; backward takes as much again for the inputs and as much again for each weight that gets a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.random_moe import from_config

# The fields of the published config.json files that decide shapes.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
            "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16, "n_shared_experts": 2,
            "n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512,
            "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
            "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
            "tie_word_embeddings": False,
        },
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {
            "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen3-30B-A3B": (
        "qwen3_moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
            "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
            "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1, "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip

WEIGHT, MOMENTS = 2, 8


@dataclass(frozen=True)
class Assumed:
    """Selected experts and frozen helpers as shares of a layer's experts, the share of routing decisions that falls on the
    selected ones, and the rank of the adapters."""

    selected: float = 1 / 16
    helpers: float = 1 / 8
    mass: float = 0.2
    rank: int = 16


@dataclass(frozen=True)
class Counts:
    """Parameters of a model: all, one token's, all routed experts', routed experts' that one token uses, adapters of rank 1."""

    total: int
    active: int
    experts: int
    active_experts: int
    adapter: int


def count(name: str) -> Counts:
    """Count parameters from the modules. Active parameters leave out the table of input embeddings: it is looked up,
    not multiplied.
    """
    from connito.moe.layout import require_moe_layers

    model = from_config(*CONFIGS[name])
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = active_experts = adapter = 0
    for layer in require_moe_layers(model).values():
        banks = [getattr(layer.experts, parameter) for parameter in layer.parameters]
        size = sum(bank.numel() for bank in banks)
        experts += size
        active_experts += size * layer.top_k // layer.num_experts
        adapter += sum(bank.shape[0] * (bank.shape[1] + bank.shape[2]) for bank in banks)
    embeddings = model.get_input_embeddings().weight.numel()
    return Counts(total, total - embeddings - experts + active_experts, experts, active_experts, adapter)


def rows(name: str, assumed: Assumed) -> list[dict[str, Any]]:
    """Return one row per method: bytes to upload, bytes resident by kind, and multiplications per token."""
    c = count(name)
    theta, helpers = int(c.experts * assumed.selected), int(c.experts * assumed.helpers)
    adapters = c.adapter * assumed.rank
    weights = 2 * c.active
    # method, parameters uploaded, resident, with a gradient, weights whose gradient a token computes
    table = [
        ("expert-only", theta, c.total - c.experts + theta + helpers, theta, int(c.active_experts * assumed.mass)),
        ("full fine-tuning", c.total, c.total, c.total, c.active),
        ("gradient masking", theta, c.total, c.experts, c.active_experts),
        ("LoRA", adapters, c.total + adapters, adapters, 0),
    ]
    return [
        {
            "model": name,
            "method": method,
            "parameters": c.total,
            "active_parameters": c.active,
            "upload_bytes": uploaded * WEIGHT,
            "weight_bytes": resident * WEIGHT,
            "gradient_bytes": trained * WEIGHT,
            "optimiser_bytes": trained * MOMENTS,
            "resident_bytes": resident * WEIGHT + trained * (WEIGHT + MOMENTS),
            # LoRA's own products per token, and peft's B·A per expert and step, are left out in its favour.
            "flops": 2 * weights + 2 * differentiated,
        }
        for method, uploaded, resident, trained, differentiated in table
    ]
