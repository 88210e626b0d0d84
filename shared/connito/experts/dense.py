"""The dense model that an MoE with one expert a layer is: its experts become MLPs, and routers are left out.

A router that scores one expert alone by a softmax gives it the weight 1, whatever the family does with the weights of several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.moe.layout import require_moe_layers
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn

# Families that score by a softmax, and the dense family whose layers are theirs but for the MLP.
DENSE = {"mixtral": "mistral", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3"}


def check_dense(model: Any) -> None:
    """Raise `Invalid` unless `model`, once it has one expert in every layer, is one of a dense family that transformers has."""
    source, why = model.config, ""
    shared = [
        layer.index
        for layer in require_moe_layers(model).values()
        if (part := getattr(layer.block, "shared_expert", None)) is not None and part.down_proj.weight.any()
    ]
    if source.model_type not in DENSE:
        why = f"models of {source.model_type} have no dense form here, those of {', '.join(DENSE)} do"
    elif shared:
        why = f"the shared expert of layer {shared[0]} is not empty, and a dense MLP cannot hold it too"
    elif getattr(source, "use_sliding_window", False):
        why = "the dense family slides its window of attention in other layers"
    if why:
        raise Invalid(f"{why}: leave out --dense, or use another base", reason=reasons_pb2.REASON_BAD_SPEC)


def to_dense(model: Any) -> nn.Module:
    """Return a dense model with the function of one whose every layer has one expert: a Mistral, Llama, Qwen2 or Qwen3.

    Where widths of experts and dense layers differ, zeros fill the narrower ones up. Raises `Invalid` as `check_dense`
    does, and for a model with more experts.
    """
    from connito.base.loading import build_empty

    check_dense(model)
    layers = require_moe_layers(model)
    if any(layer.num_experts != 1 for layer in layers.values()):
        raise Invalid("only a model with one expert in every layer has a dense form; prune it to one first")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for layer in layers.values():
        block = layer.experts_name.rpartition(".")[0]
        gate, up = tensors[f"{layer.experts_name}.gate_up_proj"][0].chunk(2)
        down = tensors[f"{layer.experts_name}.down_proj"][0]
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{block}.")}
        mlp = f"{block.rpartition('.')[0]}.mlp"
        tensors |= {f"{mlp}.gate_proj.weight": gate, f"{mlp}.up_proj.weight": up, f"{mlp}.down_proj.weight": down}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    width = max(len(tensor) for name, tensor in tensors.items() if name.endswith("mlp.gate_proj.weight"))
    filled = {name: _filled(name, tensor, width).contiguous() for name, tensor in tensors.items()}
    return build_empty(_config(model.config, width), filled).to(model.device)


def _filled(name: str, tensor: torch.Tensor, width: int) -> torch.Tensor:
    from torch.nn import functional as F

    if name.endswith(("mlp.gate_proj.weight", "mlp.up_proj.weight")):
        return F.pad(tensor, (0, 0, 0, width - tensor.shape[0]))
    return F.pad(tensor, (0, width - tensor.shape[1])) if name.endswith("mlp.down_proj.weight") else tensor


def _config(source: Any, width: int) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    # Qwen2 always has biases of attention; without them it is a Llama.
    family = DENSE[source.model_type] if getattr(source, "qkv_bias", True) else "llama"
    known = CONFIG_MAPPING[family]().to_dict().keys() - {"model_type", "transformers_version", "layer_types"}
    fields = {name: value for name, value in source.to_dict().items() if name in known}
    fields |= {
        "intermediate_size": width,
        "head_dim": getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]],
        "dtype": source.dtype,
    }
    return CONFIG_MAPPING[family](
        **{name: value for name, value in fields.items() if name != "head_dim" or name in known}
    )
