"""Leave experts out: choose which ones, mask them in routing or remove them for good.

naee             per layer, the subset whose layer output is closest to the full layer's on calibration text: every
                 subset where there are few, else one expert dropped at a time (NAEE, Lu et al. 2024, eq. 2)
router-weighted  experts by Σ_t g_e(x_t)·‖E_e(x_t)‖, over all layers at once (the score of MoE-Pruner, Xie et al. 2024,
                 taken for whole experts)
moe-i2           places are dealt to layers by how much losing an expert there costs, then as naee within each
                 (after MoE-I², Yang et al. 2024, section 3.1)

Shapes: T calibration tokens, H hidden size, N experts, k experts per token. `Keep`: kept expert ids by layer, ascending.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.errors import Invalid
from connito.experts.measure import loss
from connito.moe.layout import MoELayer, require_moe_layers
from connito.moe.router import choice
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

Keep = dict[int, list[int]]
METHODS = ("naee", "router-weighted", "moe-i2")
# As many subsets of a layer's experts are tried one by one; beyond, experts are dropped greedily.
EXACT_SUBSETS = 3000
_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")


@dataclass(frozen=True)
class Tape:
    """One layer on calibration text: what enters it [T, H], every expert's output on it [N, T, H], the layer's own [T, H]."""

    layer: MoELayer
    inputs: torch.Tensor
    outputs: torch.Tensor
    full: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def error(self, keep: list[int]) -> float:
        """Return ‖F(x) − F_keep(x)‖_F when the router chooses among `keep` only."""
        ids, weights = route(subset_router(self.layer, keep), self.inputs)
        return float((self.full - _mix(self.outputs[keep], ids, weights)).norm())

    def importance(self) -> npt.NDArray[np.float64]:
        """Return Σ_t g_e(x_t)·‖E_e(x_t)‖ / T per expert, [N]."""
        norms = self.outputs.norm(dim=-1)
        picked = norms.gather(0, self.ids.T).T * self.weights
        sums = torch.zeros(self.layer.num_experts, dtype=torch.float64)
        sums.index_add_(0, self.ids.flatten(), picked.double().flatten())
        return np.asarray(sums.numpy() / len(self.inputs))


def record(model: nn.Module, sequences: npt.NDArray[Any], *, max_tokens: int = 2048) -> dict[int, Tape]:
    """Run `sequences` int32 [n, L] through `model` and keep what each MoE layer saw, up to `max_tokens` tokens."""
    layers = require_moe_layers(model)
    seen: dict[int, list[torch.Tensor]] = {index: [] for index in layers}
    with ExitStack() as stack, torch.inference_mode():
        for index, layer in layers.items():
            check_prunable(layer)

            def hook(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                seen[index].append(args[0].reshape(-1, args[0].shape[-1]))

            stack.callback(layer.router.register_forward_pre_hook(hook).remove)
        rows = max(1, max_tokens // max(1, sequences.shape[1]))
        for row in sequences[:rows]:
            model(input_ids=torch.from_numpy(row[None].astype(np.int64)), use_cache=False)
    if not any(seen.values()):
        raise Invalid("the calibration text is empty: give text of the domain", reason=reasons_pb2.REASON_BAD_SPEC)
    return {index: _tape(layer, torch.cat(seen[index])[:max_tokens]) for index, layer in layers.items()}


def _tape(layer: MoELayer, x: torch.Tensor) -> Tape:
    with torch.inference_mode():
        ids, weights = route(layer.router, x)
        one = torch.ones(len(x), 1, dtype=x.dtype)
        outputs = torch.stack([layer.experts(x, torch.full((len(x), 1), e), one) for e in range(layer.num_experts)])
        return Tape(layer, x, outputs, _mix(outputs, ids, weights), ids, weights)


def _mix(outputs: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    tokens = torch.arange(ids.shape[0])[:, None]
    return (outputs[ids, tokens] * weights[..., None]).sum(dim=1)


def route(router: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (ids, weights), both [T, k], as the family's own router chooses for x [T, H]."""
    with torch.inference_mode():
        _, weights, ids = choice(router(x))
        return ids.reshape(len(x), -1), weights.reshape(len(x), -1)


def check_prunable(layer: MoELayer) -> None:
    """Raise `Invalid` for routers whose choice depends on fixed groups of experts."""
    if int(getattr(layer.router, "n_group", 1) or 1) > 1:
        raise Invalid(
            "this family routes within fixed groups of experts, which cannot be pruned singly",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )


def subset_router(layer: MoELayer, keep: list[int]) -> nn.Module:
    """Return a copy of the layer's router that knows only `keep`; its ids are places in `keep`."""
    router: Any = copy.copy(layer.router)
    router._parameters, router._buffers = dict(layer.router._parameters), dict(layer.router._buffers)
    router._forward_hooks, router._forward_pre_hooks = type(router._forward_hooks)(), type(router._forward_pre_hooks)()
    router.__dict__.pop("forward", None)
    _shrink(router, layer.num_experts, keep)
    subset: nn.Module = router
    return subset


def _shrink(module: Any, total: int, keep: list[int]) -> None:
    """Keep the rows `keep` of everything in `module` that has one row per expert, and set its counts."""
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None and tensor.ndim and tensor.shape[0] == total:
                rows = tensor.detach()[keep].clone()
                table[name] = torch.nn.Parameter(rows, requires_grad=False) if table is module._parameters else rows
    for name in _COUNTS:
        if getattr(module, name, None) == total:
            setattr(module, name, len(keep))
    if isinstance(getattr(module, "top_k", None), int):
        module.top_k = min(module.top_k, len(keep))


@contextmanager
def masked(model: nn.Module, keep: Mapping[int, list[int]]) -> Iterator[nn.Module]:
    """Make routers choose among `keep` only inside the block: the pruned model's function, with nothing removed."""
    layers = require_moe_layers(model)
    check_keep(layers, keep)
    routers: list[Any] = []
    try:
        for index, experts in keep.items():
            router: Any = layers[index].router
            subset, places = subset_router(layers[index], experts), torch.tensor(experts)

            def forward(*args: Any, subset: Any = subset, places: torch.Tensor = places, **kwargs: Any) -> Any:
                output = subset(*args, **kwargs)
                logits, weights, ids = choice(output)
                return (logits, weights, places[ids], *output[3:])

            router.forward = forward
            routers.append(router)
        yield model
    finally:
        for router in routers:
            del router.forward


def prune(model: nn.Module, keep: Mapping[int, list[int]]) -> nn.Module:
    """Remove every expert that is not in `keep` from its layer, in place. Layers that `keep` leaves out stay whole.

    The model's configuration follows where all layers keep the same number; `connito.experts.export` needs that.
    """
    layers = require_moe_layers(model)
    check_keep(layers, keep)
    modules = dict(model.named_modules())
    for index, experts in keep.items():
        layer = layers[index]
        check_prunable(layer)
        total = layer.num_experts
        for module in (layer.experts, layer.router):
            _shrink(module, total, list(experts))
        block: Any = modules[layer.experts_name.rpartition(".")[0]]
        for name in _COUNTS:
            if getattr(block, name, None) == total:
                setattr(block, name, len(experts))
        if isinstance(getattr(block, "top_k", None), int):
            block.top_k = min(block.top_k, len(experts))
    _follow(model)
    return model


def _follow(model: Any) -> None:
    counts = {layer.num_experts for layer in require_moe_layers(model).values()}
    if len(counts) != 1:
        return
    (count,) = counts
    for name in _COUNTS:
        if isinstance(getattr(model.config, name, None), int):
            setattr(model.config, name, count)
    if isinstance(getattr(model.config, "num_experts_per_tok", None), int):
        model.config.num_experts_per_tok = min(model.config.num_experts_per_tok, count)


def check_keep(layers: Mapping[int, MoELayer], keep: Mapping[int, list[int]]) -> None:
    """Raise `Invalid` unless every layer keeps at least one of its own experts, ascending."""
    for index, experts in keep.items():
        known = index in layers and experts and experts == sorted(set(experts))
        if not known or experts[0] < 0 or experts[-1] >= layers[index].num_experts:
            raise Invalid(
                f"layer {index} cannot keep experts {experts}: name at least one of its own, ascending",
                reason=reasons_pb2.REASON_SELECTION_FAILED,
            )


def choose(
    model: nn.Module,
    sequences: npt.NDArray[Any],
    method: str = "naee",
    *,
    max_experts: int = 0,
    max_bytes: int = 0,
    max_tokens: int = 2048,
) -> Keep:
    """Return the experts to keep when at most `max_experts` (over all layers), or `max_bytes` of expert tensors, may
    stay.

    sequences: calibration text int32 [n, L + 1]. naee keeps equally many in every layer, the others as many as each
    layer earns, at least one. Raises `Invalid` (BAD_SPEC) for a budget below one expert a layer.
    """
    layers = require_moe_layers(model)
    budget = _budget(layers, max_experts, max_bytes)
    if method not in METHODS:
        raise Invalid(f"unknown pruning method {method!r}: use {', '.join(METHODS)}")
    tapes = record(model, sequences[:, :-1], max_tokens=max_tokens)
    if method == "naee":
        return {
            index: naee(tape, max(1, min(budget // len(tapes), tape.layer.num_experts)))
            for index, tape in tapes.items()
        }
    if method == "router-weighted":
        return _best(tapes, budget)
    counts = deal(layer_costs(model, sequences), {i: layer.num_experts for i, layer in layers.items()}, budget)
    return {index: naee(tape, counts[index]) for index, tape in tapes.items()}


def _budget(layers: Mapping[int, MoELayer], max_experts: int, max_bytes: int) -> int:
    """Return the number of experts that may stay. All layers' experts have one size in every family known here."""
    total = sum(layer.num_experts for layer in layers.values())
    budget = min(max_experts or total, total)
    if max_bytes:
        size = max(expert_bytes(layer) for layer in layers.values())
        budget = min(budget, max_bytes // size)
    if budget < len(layers):
        raise Invalid(
            f"the budget admits {budget} experts, but {len(layers)} layers need one each: raise --max-experts or --max-bytes",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    return budget


def expert_bytes(layer: MoELayer) -> int:
    """Return the size of one expert of the layer."""
    rows = [getattr(layer.experts, name)[0] for name in layer.parameters]
    return sum(row.numel() * row.element_size() for row in rows)


def naee(tape: Tape, count: int) -> list[int]:
    """Return the `count` experts whose layer output is closest to the full layer's."""
    total = tape.layer.num_experts
    if comb(total, count) <= EXACT_SUBSETS:
        return list(min(combinations(range(total), count), key=lambda keep: (tape.error(list(keep)), keep)))
    keep = list(range(total))
    while len(keep) > count:
        drop = min(keep, key=lambda e: (tape.error([x for x in keep if x != e]), e))
        keep.remove(drop)
    return keep


def _best(tapes: Mapping[int, Tape], budget: int) -> Keep:
    """Keep the best expert of each layer, then the best of all layers; a layer's importances are shares of its own
    sum.
    """
    shares = {index: (scores := tape.importance()) / max(scores.sum(), 1e-300) for index, tape in tapes.items()}
    keep = {index: [int(np.argmax(score))] for index, score in shares.items()}
    rest = sorted(
        (-float(score[e]), index, e)
        for index, score in shares.items()
        for e in range(len(score))
        if e not in keep[index]
    )
    for _, index, expert in rest[: budget - len(keep)]:
        keep[index].append(expert)
    return {index: sorted(experts) for index, experts in keep.items()}


def layer_costs(model: nn.Module, sequences: npt.NDArray[Any]) -> dict[int, float]:
    """Return mean rise of the loss when one expert of a layer is left out, never below zero, by layer."""
    layers, whole = require_moe_layers(model), loss(model, sequences)
    costs = {}
    for index, layer in layers.items():
        rises = []
        for expert in range(layer.num_experts if layer.num_experts > 1 else 0):
            with masked(model, {index: [e for e in range(layer.num_experts) if e != expert]}):
                rises.append(max(0.0, loss(model, sequences) - whole))
        costs[index] = float(np.mean(rises)) if rises else 0.0
    return costs


def deal(costs: Mapping[int, float], totals: Mapping[int, int], budget: int) -> dict[int, int]:
    """Return `budget` places in proportion to `costs`, at least 1 and at most `totals[l]` a layer; every place is given."""
    counts = dict.fromkeys(sorted(costs), 1)
    scale = sum(costs.values()) or 1.0
    wanted = {
        index: budget * (cost / scale if sum(costs.values()) else 1 / len(costs)) for index, cost in costs.items()
    }
    for _ in range(min(budget, sum(totals.values())) - len(counts)):
        open_ = [index for index in counts if counts[index] < totals[index]]
        counts[max(open_, key=lambda index: (wanted[index] - counts[index], -index))] += 1
    return counts


def progressive(
    model: nn.Module,
    sequences: npt.NDArray[Any],
    count: int = 1,
    *,
    tune: Callable[[nn.Module], None] | None = None,
) -> tuple[Keep, list[tuple[int, float]]]:
    """Halve the experts of every layer until `count` are left, each time by use on the task's own text, in place.

    After each halving `tune` may train what is left. Returns the kept experts by their ids in the model as it was, and
    (experts a layer, loss) after each step. After Task-Specific Expert Pruning (Chen et al. 2022).
    """
    layers = require_moe_layers(model)
    left = {index: list(range(layer.num_experts)) for index, layer in layers.items()}
    history = [(max(map(len, left.values())), loss(model, sequences))]
    while max(map(len, left.values())) > count:
        tapes = record(model, sequences[:, :-1])
        keep = {}
        for index, tape in tapes.items():
            size = (
                max(count, (tape.layer.num_experts + 1) // 2)
                if tape.layer.num_experts > count
                else tape.layer.num_experts
            )
            keep[index] = sorted(int(e) for e in np.argsort(-tape.importance(), kind="stable")[:size])
        prune(model, keep)
        left = {index: [left[index][e] for e in experts] for index, experts in keep.items()}
        if tune is not None:
            tune(model)
        history.append((max(map(len, left.values())), loss(model, sequences)))
    return left, history
