"""Clustered upcycling: a dense model becomes a Mixture-of-Experts that computes the same function and already routes by domain.

The last layers' MLPs are copied into experts, and with identical experts and renormalised top-k weights the output does
not change. Routers are not trained: their rows are spherical k-means centroids of the hidden states that they will see,
so tokens of one domain share experts from the start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid, VerificationFailed
from connito.runtime.progress import Progress, silent
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn


# Largest difference of logits between the dense model and its upcycled form, in fp32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Upcycled:
    """The new model, and what was measured while making it."""

    model: nn.Module
    max_logit_difference: float
    # Mean cosine of centred hidden states to their centroid, and each centroid's share of tokens, per layer.
    cohesion: dict[int, float]
    shares: dict[int, list[float]]


def upcycle(
    dense: Any,
    texts: Mapping[str, torch.Tensor],
    held: torch.Tensor,
    *,
    moe_layers: int,
    experts: int,
    top_k: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Upcycled:
    """Return a Qwen2-MoE with the function of `dense`, a Llama-like causal language model.

    `texts`: token ids [n, L] by domain, what the routers are clustered on. `held`: ids [n, L] of other text, on which
    the two models are compared. Deterministic for a seed and a thread count.

    Raises `Invalid` for a model whose layers a Qwen2-MoE cannot express, `VerificationFailed` when logits differ by
    more than `TOLERANCE`.
    """
    import torch

    from connito.base.clustering import cluster_router

    layers = dense.model.layers
    check_source(dense, moe_layers, experts, top_k)
    first = len(layers) - moe_layers
    dense.eval()
    with torch.no_grad():
        hidden = _mlp_inputs(dense, texts, range(first, len(layers)), progress)
        routers: dict[int, torch.Tensor] = {}
        cohesion: dict[int, float] = {}
        shares: dict[int, list[float]] = {}
        for done, (index, states) in enumerate(hidden.items()):
            routers[index], labels, cohesion[index] = cluster_router(states, experts, seed + index)
            shares[index] = (torch.bincount(labels, minlength=experts) / len(labels)).tolist()
            progress("clustering the routers", (done + 1) / moe_layers)
        model = _assemble(dense, routers, experts, top_k)
        difference = max_difference(dense, model, held, progress)
    if not difference < TOLERANCE:
        raise VerificationFailed(
            f"the upcycled model's logits differ from the dense model's by up to {difference:.2e}, more than {TOLERANCE}: "
            "the source model has something that a Qwen2-MoE does not; use another source model"
        )
    return Upcycled(model, difference, cohesion, shares)


def check_source(dense: Any, moe_layers: int, experts: int, top_k: int) -> None:
    """Raise `Invalid` when `dense` is not Llama-like or the numbers do not fit it."""
    layers = getattr(getattr(dense, "model", None), "layers", None)
    count = len(layers) if layers is not None else 0
    first: Any = layers[0] if layers is not None and count else None
    fits = (
        first is not None
        and all(hasattr(getattr(first, "mlp", None), name) for name in ("gate_proj", "up_proj", "down_proj"))
        and all(hasattr(getattr(first, "self_attn", None), f"{name}_proj") for name in "qkvo")
        and not hasattr(first.self_attn, "q_norm")
        and first.mlp.gate_proj.bias is None
        and first.self_attn.o_proj.bias is None
    )
    if not fits:
        family = getattr(getattr(dense, "config", None), "model_type", type(dense).__name__)
        raise Invalid(
            f"{family!r} is not a Llama-type dense model (rotary attention without q/k norms, gated MLP without biases), "
            "the only kind that is upcycled; use one, or import an MoE checkpoint with `connito base import DIR`",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    if not (1 <= moe_layers <= count and experts >= 2 and 1 <= top_k <= experts):
        raise Invalid(
            f"cannot turn {moe_layers} of {count} layers into {experts} experts with top-{top_k}: need "
            f"1 ≤ moe-layers ≤ {count}, experts ≥ 2 and 1 ≤ top-k ≤ experts",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )


def _mlp_inputs(
    dense: Any, texts: Mapping[str, torch.Tensor], indices: range, progress: Progress
) -> dict[int, torch.Tensor]:
    """Return each MLP's inputs, [T, H] per layer, domains in name order, without each sequence's first token (an
    attention sink)."""
    import torch

    seen: dict[int, list[torch.Tensor]] = {index: [] for index in indices}

    def watch(index: int) -> Callable[[Any, Any], None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[index].append(args[0][:, 1:].reshape(-1, args[0].shape[-1]).float().cpu())

        return hook

    handles = [dense.model.layers[index].mlp.register_forward_pre_hook(watch(index)) for index in indices]
    rows = [row for domain in sorted(texts) for row in texts[domain]]
    try:
        for done, row in enumerate(rows):
            dense.model(input_ids=row[None].long(), use_cache=False)
            progress("reading the probe text", (done + 1) / len(rows))
    finally:
        for handle in handles:
            handle.remove()
    return {index: torch.cat(parts) for index, parts in seen.items()}


def moe_config(dense: Any, first: int, experts: int, top_k: int) -> Any:
    """Return a Qwen2-MoE configuration whose layers from `first` on are sparse. The shared expert is one unit wide and
    zero.
    """
    from transformers import Qwen2MoeConfig

    source = dense.config
    return Qwen2MoeConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        moe_intermediate_size=source.intermediate_size,
        shared_expert_intermediate_size=1,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        hidden_act=source.hidden_act,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        tie_word_embeddings=source.tie_word_embeddings,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        mlp_only_layers=list(range(first)),
        qkv_bias=dense.model.layers[0].self_attn.q_proj.bias is not None,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
        dtype="float32",
        architectures=["Qwen2MoeForCausalLM"],
    )


def _assemble(dense: Any, routers: Mapping[int, torch.Tensor], experts: int, top_k: int) -> nn.Module:
    import torch

    from connito.base.loading import build_empty

    config = moe_config(dense, min(routers), experts, top_k)
    tensors = {name: tensor.detach().float() for name, tensor in dense.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    hidden = config.hidden_size
    for index, router in routers.items():
        mlp = f"model.layers.{index}.mlp"
        gate, up, down = (tensors.pop(f"{mlp}.{name}_proj.weight") for name in ("gate", "up", "down"))
        tensors |= {
            f"{mlp}.gate.weight": router,
            f"{mlp}.experts.gate_up_proj": torch.cat([gate, up])[None].repeat(experts, 1, 1),
            f"{mlp}.experts.down_proj": down[None].repeat(experts, 1, 1),
            f"{mlp}.shared_expert.gate_proj.weight": torch.zeros(1, hidden),
            f"{mlp}.shared_expert.up_proj.weight": torch.zeros(1, hidden),
            f"{mlp}.shared_expert.down_proj.weight": torch.zeros(hidden, 1),
            f"{mlp}.shared_expert_gate.weight": torch.zeros(1, hidden),
        }
    return build_empty(config, tensors)


def max_difference(dense: Any, model: Any, held: torch.Tensor, progress: Progress = silent) -> float:
    """Return largest |difference| of logits over `held` [n, L]."""
    worst = 0.0
    for done, row in enumerate(held):
        ids = row[None].long()
        difference = dense(input_ids=ids, use_cache=False).logits - model(input_ids=ids, use_cache=False).logits
        worst = max(worst, float(difference.abs().max()))
        progress("comparing with the dense model", (done + 1) / len(held))
    return worst
