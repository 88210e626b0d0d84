"""Saving a model as a GGUF file, for the families whose arithmetic llama.cpp has.

Names of tensors and keys are the `gguf` package's. What a family keeps in another order is put into llama.cpp's: rotary
pairs side by side where it turns them so, gate and up apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from connito.base.gguf_tokens import add_tokens
from connito.errors import Invalid
from connito.moe.layout import MoELayer, require_moe_layers
from connito.v1 import reasons_pb2

GGUF_FILE = "model.gguf"


@dataclass(frozen=True)
class _Family:
    """A family as llama.cpp names it. `paired`: rotary pairs lie side by side there; `renormalised`: gates sum to 1 there."""

    architecture: str
    paired: bool = False
    renormalised: bool = True


# By model_type of transformers.
_FAMILIES = {
    "mixtral": _Family("llama", paired=True),
    "qwen2_moe": _Family("qwen2moe", renormalised=False),
    "qwen3_moe": _Family("qwen3moe"),
    "olmoe": _Family("olmoe", renormalised=False),
}
# A Qwen2-MoE whose gates are renormalised, whose first layers are dense and whose shared expert is empty computes what this does.
_UPCYCLED = _Family("ernie4_5-moe", paired=True)


def save_gguf(model: Any, out_dir: Path, tokenizer: Any, *, name: str = "", license_name: str = "") -> Path:
    """Write `model.gguf`, in the model's own type (matrices; vectors and routers in float32); returns its path.

    Raises `Invalid` for a family, or a setting of one, that llama.cpp does not compute.
    """
    import gguf

    layers = require_moe_layers(model)
    family, config = _family(model, layers), model.config
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / GGUF_FILE
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_name(name or config.model_type)
    if license_name:
        writer.add_license(license_name)
    _add_numbers(writer, model, family, layers)
    add_tokens(writer, tokenizer, config.vocab_size)
    architecture = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in _tensors(model, layers, family):
        given = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if given is None:
            raise _refused(config.model_type, f"has no place for {key}")
        _add_tensor(writer, given, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _family(model: Any, layers: dict[int, MoELayer]) -> _Family:
    config, kind = model.config, model.config.model_type
    if kind not in _FAMILIES:
        raise _refused(kind, f"is not one of {', '.join(sorted(_FAMILIES))}")
    family, depth = _FAMILIES[kind], config.num_hidden_layers
    if config.hidden_act != "silu" or getattr(config, "clip_qkv", None):
        raise _refused(kind, "has another activation or clips its attention")
    if config.rope_parameters.get("rope_type", "default") != "default":
        raise _refused(kind, f"stretches positions by {config.rope_parameters['rope_type']}")
    if getattr(config, "attention_bias", False) or (
        kind == "qwen2_moe" and not config.qkv_bias and len(layers) == depth
    ):
        raise _refused(kind, "has biases in its attention where none are, or none where they are")
    if getattr(config, "use_sliding_window", kind == "mixtral") and getattr(config, "sliding_window", None):
        raise _refused(kind, "attends to a sliding window")
    if kind == "olmoe" and config.num_key_value_heads != config.num_attention_heads:
        raise _refused(kind, "has fewer key heads than query heads")
    renormalised = bool(getattr(config, "norm_topk_prob", True))
    if kind == "qwen2_moe" and renormalised and list(layers) == list(range(min(layers), depth)) and _no_shared(model):
        return _UPCYCLED
    if len(layers) != depth:
        raise _refused(kind, "has dense layers beside sparse ones")
    if renormalised != family.renormalised:
        raise _refused(kind, f"{'renormalises' if renormalised else 'does not renormalise'} its gates")
    return family


def _no_shared(model: Any) -> bool:
    return not any(tensor.any() for name, tensor in model.named_parameters() if "shared_expert.down_proj" in name)


def _add_numbers(writer: Any, model: Any, family: _Family, layers: dict[int, MoELayer]) -> None:
    config, first = model.config, next(iter(layers.values()))
    bank: Any = first.experts
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(first.num_experts)
    writer.add_expert_used_count(first.top_k)
    writer.add_expert_feed_forward_length(bank.down_proj.shape[-1])
    if family is _UPCYCLED:
        writer.add_leading_dense_block_count(min(layers))
        writer.add_interleave_moe_layer_step(1)
    elif config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _tensors(model: Any, layers: dict[int, MoELayer], family: _Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Give every tensor by the name of its published layout, in llama.cpp's order. `[experts, …]` for experts."""
    banks = {f"{layer.experts_name}.{part}" for layer in layers.values() for part in layer.parameters}
    config = model.config
    paired = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if family.paired else {}
    for name, tensor in model.state_dict().items():
        own = name.rsplit(".", 2)[-2] if "." in name else name
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        if name in banks or tied or (family is _UPCYCLED and "shared_expert" in name):
            continue
        yield name, _paired(tensor, paired[own]) if own in paired else tensor
    for layer in layers.values():
        bank: Any = layer.experts
        gate, up = bank.gate_up_proj.detach().chunk(2, dim=1)
        for part, tensor in (("gate_proj", gate), ("up_proj", up), ("down_proj", bank.down_proj.detach())):
            yield f"{layer.experts_name}.{part}.weight", tensor


def _paired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return rows of a projection with the two halves of every head interleaved."""
    rest = tensor.shape[1:]
    return tensor.view(heads, 2, -1, *rest).transpose(1, 2).reshape(-1, *rest)


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor) -> None:
    from gguf import GGMLQuantizationType, quants

    exact = tensor.dim() == 1 or "ffn_gate_inp" in name
    if tensor.dtype == torch.bfloat16 and not exact:
        kind = GGMLQuantizationType.BF16
        writer.add_tensor(name, quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, (tensor.float() if exact else tensor).contiguous().numpy())


def _refused(kind: str, why: str) -> Invalid:
    return Invalid(
        f"llama.cpp cannot run this {kind} model: it {why}; export it with --format hf or hf-hub",
        reason=reasons_pb2.REASON_BAD_SPEC,
    )
