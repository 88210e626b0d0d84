"""Residual experts: a dense MLP that every token passes, and beside it one expert that corrects it (Residual-MoE).

In DeepSpeed-MoE (Rajbhandari et al. 2022, section 4.1) a layer is MLP(x) + p·E(x): the dense part stays as it was, the
router picks an expert, and its softmax score p is the weight of the correction. Here the dense part is the shared expert of a
Qwen2-MoE, which nothing selects and no miner trains. It is doubled and weighed by a sigmoid gate that starts at one half, in
the place of the published code's coefficient; experts start without output, so that the function is that of the dense model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn


def as_residual(model: Any) -> nn.Module:
    """Return `model`, as `connito.base.upcycle` makes it, with its dense MLPs for shared experts and corrections for experts.

    Each of the experts starts as the MLP whose output is set to zero: its gradient is not.
    """
    import torch

    from connito.base.loading import build_empty
    from connito.moe.layout import require_moe_layers

    config = copy.deepcopy(model.config)
    config.shared_expert_intermediate_size = config.moe_intermediate_size
    # The correction weighs as much as its router's score says; one expert that is scaled to one could not be unlearnt.
    config.norm_topk_prob = False
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    for layer in require_moe_layers(model).values():
        bank: Any = layer.experts
        if not all(torch.equal(each, bank.down_proj[0]) for each in bank.down_proj):
            raise Invalid(
                f"the experts of layer {layer.index} differ: only copies of one dense MLP become corrections of it",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )
        gate, up = bank.gate_up_proj.detach()[0].chunk(2)
        mlp = f"model.layers.{layer.index}.mlp"
        tensors |= {
            f"{mlp}.shared_expert.gate_proj.weight": gate.clone(),
            f"{mlp}.shared_expert.up_proj.weight": up.clone(),
            f"{mlp}.shared_expert.down_proj.weight": 2 * bank.down_proj.detach()[0],
            f"{mlp}.experts.down_proj": torch.zeros_like(bank.down_proj),
        }
    return build_empty(config, tensors)
