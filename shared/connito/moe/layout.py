"""Location of the routed experts in a Hugging Face model: one description for every fused-experts family.

transformers ≥ 5 keeps the experts of a layer in one module with fused tensors `[experts, …]` and a router beside it,
in some sixty families. Whatever follows that interface is found here by its shape, not by its name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

# Tensors that have one row per expert. A family has a subset of them.
ROW_PARAMETERS = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
)
ROUTER_NAMES = ("gate", "router")
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a live model. `parameters` are the names of the fused tensors in `experts`; `block` holds both."""

    index: int
    experts_name: str
    experts: nn.Module
    router_name: str
    router: nn.Module
    num_experts: int
    top_k: int
    parameters: tuple[str, ...]
    block: nn.Module


def find_moe_layers(model: nn.Module) -> dict[int, MoELayer]:
    """Return MoE layers by decoder layer index, ascending; empty for a dense model.

    Raises `Invalid` when two experts modules share a layer index (a text and a vision bank, say), because a selection
    map names layers by index alone.
    """
    modules = dict(model.named_modules())
    found: dict[int, MoELayer] = {}
    for name, module in modules.items():
        layer = _describe(name, module, modules)
        if layer is None:
            continue
        if layer.index in found:
            raise Invalid(
                f"layer {layer.index} has two banks of experts ({found[layer.index].experts_name} and {name}): models "
                "with several experts modules in one layer are not supported; use a text-only checkpoint",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )
        found[layer.index] = layer
    return dict(sorted(found.items()))


def require_moe_layers(model: nn.Module) -> dict[int, MoELayer]:
    """Return `find_moe_layers`, or `Invalid` that says why there are none, or none that compute, and what to do."""
    found = find_moe_layers(model)
    if odd := next((layer for layer in found.values() if not 0 < layer.top_k <= layer.num_experts), None):
        raise Invalid(
            f"config.json sends each token to {odd.top_k} experts, and {odd.experts_name} has {odd.num_experts}: set the number "
            f"of experts per token to one of 1 to {odd.num_experts}",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    if found:
        return found
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if any(name.rpartition(".")[2] in ("experts", "router") for name, _ in model.named_modules()):
        why = f"the family {family!r} has experts, but not as fused tensors with a router that reports its choice"
        remedy = "use a family that follows the transformers experts interface"
    else:
        why = f"{family!r} is a dense model: it has no routed experts to select"
        remedy = "turn it into one with `connito base build --from MODEL`"
    raise Invalid(f"no trainable experts found: {why}; {remedy}", reason=reasons_pb2.REASON_SELECTION_FAILED)


def layer_index(module_name: str) -> int:
    """Return the decoder layer that a module lies in, from its name."""
    return int(_LAYER.findall(module_name + ".")[-1])


def _describe(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> MoELayer | None:
    if not _LAYER.search(name + ".") or not hasattr(module, "is_transposed") or not hasattr(module, "has_gate"):
        return None
    parent, _, _ = name.rpartition(".")
    router_name = next((f"{parent}.{r}" for r in ROUTER_NAMES if f"{parent}.{r}" in modules), None)
    parameters = tuple(p for p in ROW_PARAMETERS if getattr(module, p, None) is not None)
    if router_name is None or not parameters:
        return None
    num_experts = int(getattr(module, parameters[-1]).shape[0])
    top_k = _top_k(modules[router_name], modules[parent], getattr(module, "config", None))
    router, block = modules[router_name], modules[parent]
    return MoELayer(layer_index(name), name, module, router_name, router, num_experts, top_k, parameters, block)


def _top_k(router: nn.Module, block: nn.Module, config: Any) -> int:
    for owner, names in ((router, ("top_k",)), (block, ("top_k",)), (config, ("num_experts_per_tok", "top_k_experts"))):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value >= 0:
                return value
    return 1


def as_targets(selection: Any) -> dict[int, list[int]]:
    """Return expert ids by layer, both ascending, from a `Selection` or a plain mapping. Empty layers are left out.

    The order of rows in a `TargetState` is this one, whatever order a selection lists its experts in.
    """
    layers: Mapping[Any, Iterable[int]] = getattr(selection, "layers", selection)
    targets = {int(layer): sorted({int(e) for e in experts}) for layer, experts in layers.items()}
    return {layer: targets[layer] for layer in sorted(targets) if targets[layer]}


def check_targets(layers: Mapping[int, MoELayer], targets: Mapping[int, list[int]]) -> None:
    """Raise `Invalid` when a selection names a layer or an expert that the model does not have."""
    for index, experts in targets.items():
        if index not in layers:
            raise Invalid(
                f"the selection names layer {index}, but the model's MoE layers are {sorted(layers)}; it was made for "
                "another base model",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )
        if experts[0] < 0 or experts[-1] >= layers[index].num_experts:
            raise Invalid(
                f"the selection names experts {experts} in layer {index}, which has {layers[index].num_experts}; it was "
                "made for another base model",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )


def check_routers(layers: Mapping[int, MoELayer], selection: Any) -> None:
    """Raise `Invalid` when a selection says which routers it was made with (or is their digest), and the model's are others.

    A map for another base can fit by its numbers alone; its experts would be the wrong ones all the same.
    """
    wanted = selection if isinstance(selection, str) else getattr(selection, "routers", "")
    if wanted and wanted != router_digest(layers):
        raise Invalid(
            "the selection was made for another base model: its routers are not this model's; select again on this base, or "
            "load the base that the map was made on",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )


def router_digest(layers: Mapping[int, MoELayer]) -> str:
    """Return SHA-256 over the routers' parameters and buffers, and over those that their blocks hold for them: what decides
    the routing, and what no training here changes.
    """
    import torch

    state = hashlib.sha256()
    for index, layer in sorted(layers.items()):
        beside = {f"block.{name}": tensor for name, tensor in layer.block.state_dict().items() if "." not in name}
        for name, tensor in [*sorted(layer.router.state_dict().items()), *sorted(beside.items())]:
            state.update(f"{index}.{name}{tuple(tensor.shape)}".encode())
            state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()
