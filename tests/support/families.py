"""Tiny random models of every fused-experts family that transformers has, for tests of what holds in all of them."""

from __future__ import annotations

import inspect
from typing import Any

import torch

# Whatever of these a family's configuration knows makes it tiny.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "expert_layer_period": 1,
    "expert_layer_offset": 0,
    "attn_layer_period": 1,
    "attn_layer_offset": 0,
    "moe_layer_start_index": 0,
    "moe_layer_interval": 1,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "o_lora_rank": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 1,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "sliding_window": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# model_type -> what differs from SMALL.
MULTI_HEAD_LATENT = {"num_key_value_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria_text": {},
    "axk1": MULTI_HEAD_LATENT,
    "axk2": MULTI_HEAD_LATENT,
    "bailing_hybrid": {},
    "beam": {"mlp_layer_types": ["dense", "sparse"]},
    "cohere2_moe": {},
    "deepseek_v2": MULTI_HEAD_LATENT,
    "deepseek_v3": MULTI_HEAD_LATENT,
    "deepseek_v32": MULTI_HEAD_LATENT,
    "deepseek_v4": {},
    "dots1": {},
    "dots3_note_text": MULTI_HEAD_LATENT,
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {},
    "glm4_moe": {},
    "glm4_moe_lite": MULTI_HEAD_LATENT,
    "glm_moe_dsa": MULTI_HEAD_LATENT,
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling_text": {},
    "inkling2_text": {},
    "jamba": {},
    "kimi_linear": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"]},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mixtral": {},
    "nemotron_h": {},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_5_moe_text": {},
    "qwen3_next": {},
    "qwen4_exp_text": {},
    "solar_open": {},
    "zaya": {"num_experts_per_tok": 1},
}
# Experts by token, from a table: there is nothing to choose otherwise.
TABLES = {"deepseek_v4"}

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def tiny_model(family: str, *, buffers: bool = False, **changes: Any) -> Any:
    """A random model of the family, eager, with values large enough for every part to matter.

    changes: fields of its configuration. buffers: those that a checkpoint stores are random too, as biases of the choice.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = {
        *inspect.signature(kind.__init__).parameters,
        *getattr(kind, "__dataclass_fields__", {}),
        *kind.attribute_map,
    }
    wanted = {**SMALL, **FAMILIES[family], **changes}
    model = AutoModelForCausalLM.from_config(
        kind(**{k: v for k, v in wanted.items() if k in known or hasattr(kind, k)})
    )
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
        stored = model.state_dict().keys() if buffers else ()
        for name, buffer in model.named_buffers():
            if name in stored:
                _fill(name, buffer, draw)
    model.set_experts_implementation("eager")
    return model.eval()


def _fill(name: str, buffer: torch.Tensor, draw: torch.Generator) -> None:
    if buffer.is_floating_point():
        buffer.copy_(torch.randn(buffer.shape, generator=draw) * 0.1)
    elif name.endswith("tid2eid"):  # by token, the experts it goes to: some three of four
        buffer.copy_(torch.stack([torch.randperm(4, generator=draw)[: buffer.shape[1]] for _ in buffer]))


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What the model says about the ids, [n, L, V]."""
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return out
