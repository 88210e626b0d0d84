"""The training model M(Φ, R, θ ∪ H): of each adapted layer the target rows and frozen helpers beside them.

Helpers are a few experts, or all others, as they are stored or in four bits (`connito.moe.residency`). The rows of the
targets become one trainable parameter per tensor, the helpers a frozen buffer. Masking gradients of a
whole bank instead would let AdamW's weight decay move frozen experts and keep its moments for every one of them.

Two plugs make this work in every family: a forward hook on the router rewrites what it chose (the routing mode), and an
implementation in transformers' experts interface finds the rows of the experts that are there.

Shapes: T tokens, k experts per token, N experts in the layer, S targets and H helpers in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid
from connito.moe.four_bit import FourBit, hold
from connito.moe.implementation import Implementation, register
from connito.moe.layout import (
    ROUTER_NAMES,
    MoELayer,
    as_targets,
    check_routers,
    check_targets,
    layer_index,
    require_moe_layers,
)
from connito.moe.residency import ALL, BACKGROUND, FOUR_BIT, HELPER, HELPERS, TARGET, Residents
from connito.moe.resident_forward import GROUPED, LOOP, grouped_forward, loop_forward
from connito.moe.router import Call, choice
from connito.moe.state import TargetState, split_name, tensor_name
from connito.protocol.policy.choices import ROUTING_MODES
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

# What a router did -> what it is to report instead; id N is the skip slot.
Reroute = Callable[[Call], tuple[Any, ...]]


def compress(
    model: nn.Module,
    selection: Any,
    helpers: Mapping[int, Iterable[int]] | None = None,
    routing_mode: str = "natural",
    background: Mapping[str, torch.Tensor] | None = None,
    top_k: int = 0,
    residency: str = HELPERS,
) -> nn.Module:
    """Turn a full model into a training model, in place, and return it.

    selection: target experts by layer; helpers: frozen experts that stay beside them; background: one merged expert for
    all that are absent, `[1, …]` per tensor (`connito.moe.background`); top_k: see `thinned`; residency: all experts are
    helpers with `all` and `four-bit`. Every layer that is not selected keeps its full bank, frozen, or has it in four
    bits. Afterwards the only parameters that require gradients are the target rows.

    Raises `Invalid` for an unknown routing mode, a selection that does not fit, a helper that is a target, or a router
    that does not report its choice.
    """
    layers = require_moe_layers(model)
    targets = as_targets(selection)
    check_routers(layers, selection)
    plan = resident_plan(layers, targets, helpers or {}, routing_mode, residency)
    model.requires_grad_(False)
    for index, residents in plan.items():
        layer = layers[index]
        banks = {name: getattr(layer.experts, name).detach() for name in layer.parameters}
        rows = {name: (bank[list(residents.targets)], _frozen(bank, residents)) for name, bank in banks.items()}
        install(layer, residents, rows, routing_mode, top_k)
    if background is not None:
        add_background(model, background)
    return model


def resident_plan(
    layers: Mapping[int, MoELayer],
    targets: Mapping[int, list[int]],
    helpers: Mapping[int, Iterable[int]],
    routing_mode: str,
    residency: str = HELPERS,
) -> dict[int, Residents]:
    """Return, checked, the experts that stay in memory, of each layer that is adapted or held in four bits."""
    if routing_mode not in ROUTING_MODES:
        raise Invalid(
            f"unknown routing mode {routing_mode!r}: use {', '.join(ROUTING_MODES)}", reason=reasons_pb2.REASON_BAD_SPEC
        )
    if not targets:
        raise Invalid("the selection is empty: there is nothing to train", reason=reasons_pb2.REASON_SELECTION_FAILED)
    check_targets(layers, dict(targets))
    plan = {}
    for index in layers if residency == FOUR_BIT else targets:
        experts, total = targets.get(index, []), layers[index].num_experts
        beside = sorted({int(e) for e in helpers.get(index, ())})
        if residency in (ALL, FOUR_BIT):
            beside = sorted(set(range(total)) - set(experts))
        if set(beside) & set(experts) or any(not 0 <= e < total for e in beside):
            raise Invalid(
                f"helpers {beside} of layer {index} must be experts 0–{total - 1} that are not targets {experts}",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )
        plan[index] = Residents(tuple(experts), tuple(beside), total, residency=residency)
    return plan


def _frozen(bank: torch.Tensor, residents: Residents) -> torch.Tensor | FourBit:
    if residents.residency == ALL:
        return bank
    if residents.residency == FOUR_BIT:
        return hold((bank[e] for e in residents.helpers), len(residents.helpers), bank.shape[1:], bank.dtype)
    return bank[list(residents.helpers)]


def install(
    layer: MoELayer,
    residents: Residents,
    rows: Mapping[str, tuple[torch.Tensor, torch.Tensor | FourBit]],
    routing_mode: str,
    top_k: int = 0,
) -> None:
    """Replace the full bank of one layer by (target rows, helper rows) per tensor and plug in the routing mode.

    The rows become the model's own storage. A layer without targets keeps its routing, and only its experts are held
    otherwise. Raises `Invalid` when `compress` was here before.
    """
    experts: Any = layer.experts
    if hasattr(experts, "connito_where"):
        raise Invalid("this model is compressed already; load the full model again", reason=reasons_pb2.REASON_BAD_SPEC)
    for name, (targets, beside) in rows.items():
        delattr(experts, name)
        if residents.targets:
            experts.register_parameter(TARGET + name, torch.nn.Parameter(targets, requires_grad=True))
        if isinstance(beside, FourBit):
            experts.add_module(HELPER + name, beside)
        else:
            experts.register_buffer(HELPER + name, beside, persistent=False)
    _locate(experts, residents)
    # The dispatcher reads the name from the module's configuration at every call; only this layer gets another one.
    experts.config = Implementation(experts.config, LOOP)
    register(LOOP, loop_forward)
    if not residents.targets:
        return
    experts.connito_residents = residents
    experts.connito_reroute = _Routing(residents, routing_mode, top_k if 0 < top_k < layer.top_k else 0)
    layer.router.register_forward_hook(_router_hook(experts.connito_reroute), with_kwargs=True)


def group_experts(model: nn.Module) -> None:
    """Let the layers of a compressed model compute all experts of a bank in one product."""
    register(GROUPED, grouped_forward)
    experts: Any
    for experts in model.modules():
        if hasattr(experts, "connito_where"):
            experts.config = Implementation(experts.config, GROUPED)


def _locate(experts: Any, residents: Residents) -> None:
    """Tell an experts module which experts it has, and the place of each; whoever is absent has the place after the last."""
    where = residents.where()
    experts.connito_where = [entry[1:] for entry in where]
    experts.connito_rows = 1 + max(entry[1] for entry in where)
    place = torch.full((residents.num_experts + 1,), experts.connito_rows)
    for expert, its_place, _, _ in where:
        place[expert] = its_place
    device = next(chain(experts.parameters(), experts.buffers())).device
    experts.register_buffer("connito_place", place.to(device), persistent=False)


def add_background(model: nn.Module, background: Mapping[str, torch.Tensor]) -> None:
    """Give the adapted layers of a compressed model one frozen expert for all that are absent.

    background: `[1, …]` by state name. With natural routing a slot on an absent expert then goes to it, with the weight
    that the router gave; helpers serve the tokens that are theirs. Raises `Invalid` for tensors that do not fit.
    """
    for index, (experts, _) in adapted_layers(model).items():
        for key, parameter in list(experts.named_parameters(recurse=False)):
            if not key.startswith(TARGET):
                continue
            name = tensor_name(index, key.removeprefix(TARGET))
            shape = (1, *parameter.shape[1:])
            if name not in background or tuple(background[name].shape) != shape:
                raise Invalid(
                    f"the background expert has no {name} of shape {shape}: it was made for another base or selection",
                    reason=reasons_pb2.REASON_WRONG_TENSORS,
                )
            rows = background[name].to(parameter.device, parameter.dtype)
            experts.register_buffer(BACKGROUND + key.removeprefix(TARGET), rows, persistent=False)
        experts.connito_residents = replace(experts.connito_residents, background=True)
        _locate(experts, experts.connito_residents)
        experts.connito_reroute.background = True


def adapted_layers(model: nn.Module) -> dict[int, tuple[Any, Any]]:
    """Return (experts module, router) of every adapted layer of a compressed model, by layer index."""
    modules = dict(model.named_modules())
    found = {}
    for name, module in modules.items():
        if hasattr(module, "connito_residents"):
            parent = name.rpartition(".")[0]
            found[layer_index(name)] = (
                module,
                next(modules[f"{parent}.{r}"] for r in ROUTER_NAMES if f"{parent}.{r}" in modules),
            )
    return dict(sorted(found.items()))


def read_targets(model: nn.Module) -> TargetState:
    """Return θ of a compressed model: copies of the target rows, on the CPU, named and ordered as everywhere."""
    state = {
        tensor_name(layer_index(name), key.removeprefix(TARGET)): parameter.detach().to("cpu", copy=True)
        for name, module in model.named_modules()
        if hasattr(module, "connito_residents")
        for key, parameter in module.named_parameters(recurse=False)
        if key.startswith(TARGET)
    }
    return {name: state[name] for name in sorted(state)}


def write_targets(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Write θ into a compressed model in place. Raises `Invalid` if names or shapes do not fit."""
    parameters = target_parameters(model)
    if set(parameters) != set(state):
        odd = sorted(set(parameters) ^ set(state))[0]
        raise Invalid(f"{odd} is not in both the state and the model", reason=reasons_pb2.REASON_WRONG_TENSORS)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if state[name].shape != parameter.shape:
                raise Invalid(
                    f"{name} has shape {tuple(state[name].shape)} where the model has {tuple(parameter.shape)}",
                    reason=reasons_pb2.REASON_WRONG_SHAPE,
                )
            parameter.copy_(state[name])


def target_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable rows of a compressed model by state name, sorted: exactly its parameters that require
    gradients.
    """
    found = {
        tensor_name(layer_index(name), key.removeprefix(TARGET)): parameter
        for name, module in model.named_modules()
        if hasattr(module, "connito_residents")
        for key, parameter in module.named_parameters(recurse=False)
        if key.startswith(TARGET)
    }
    return {name: found[name] for name in sorted(found, key=split_name)} if found else {}


def _router_hook(reroute: Reroute) -> Callable[..., Any]:
    def hook(router: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        logits, _, ids = choice(output)
        again = reroute(Call(router, args, output, kwargs))
        _, new_weights, new_ids = choice(again)
        shape = (*ids.shape[:-1], new_ids.shape[-1])
        return (logits, new_weights.reshape(shape), new_ids.reshape(shape), *again[3:])

    return hook


class _Routing:
    """A routing mode, at `top_k` experts a token or as many as the family takes (0), as a function of a router's call."""

    def __init__(self, residents: Residents, mode: str, top_k: int = 0) -> None:
        self.total, self.mode, self.top_k, self.background = residents.num_experts, mode, top_k, residents.background
        self.present = torch.zeros(self.total + 1, dtype=torch.bool)
        self.present[[*residents.targets, *residents.helpers]] = True
        self.helpers = torch.tensor(residents.helpers, dtype=torch.long)
        self.residents = torch.tensor(sorted((*residents.targets, *residents.helpers)), dtype=torch.long)

    def __call__(self, call: Call) -> tuple[Any, ...]:
        if self.mode != "natural":
            return call.among(self.residents, self.total, top_k=self.top_k, alone=self.mode == "restricted")
        output = thinned(call, self.top_k) if self.top_k else call.output
        logits, weights, ids = choice(output)
        return (logits, *self._natural(logits.reshape(-1, logits.shape[-1]), _rows(weights), _rows(ids)), *output[3:])

    def _natural(
        self, logits: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        absent = ~self.present.to(ids.device)[ids]
        if self.background:
            return weights, ids.masked_fill(absent, self.total)
        if len(self.helpers) == 0:
            return weights.masked_fill(absent, 0), ids.masked_fill(absent, self.total)
        beside = self.helpers.to(ids.device)
        best = beside[logits.index_select(-1, beside).argmax(dim=-1, keepdim=True)]
        return weights, torch.where(absent, best.to(ids.dtype), ids)


def thinned(call: Call, top_k: int) -> tuple[Any, ...]:
    """Return what the family's router reports at `top_k` experts a token, for a miner with less compute (FFT-MoE).

    The weights are those that the call reported, which a hook before may have moved, at the sum that the family gives.
    """
    fewer = call.fewer(top_k)
    (_, weights, ids), (_, family, kept) = choice(call.output), choice(fewer)
    same = _rows(kept)[:, :, None] == _rows(ids)[:, None]
    own = (same * _rows(weights)[:, None]).sum(-1)
    whole = own.sum(-1, keepdim=True)
    scale = _rows(family).sum(-1, keepdim=True) / whole.where(whole != 0, torch.ones_like(whole))
    return (fewer[0], (own * scale).to(weights.dtype).view(kept.shape), kept, *fewer[3:])


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
