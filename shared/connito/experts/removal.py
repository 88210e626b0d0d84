"""Take experts out of a layer: their rows in the bank, and whatever the family's router and block keep one of per expert.

What a router does without an expert follows from the router itself (`connito.moe.router`); a router that is cut to the
experts left has to do the same, or the family cannot be cut and is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid
from connito.moe.router import Call, choice
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

    from connito.moe.layout import MoELayer

# How families count experts, and the classes of a router, of which some may be no expert.
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
CLASSES = (*COUNTS, "num_router_classes", "n_total_experts")
PER_TOKEN = ("top_k", "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


def check_prunable(layer: MoELayer) -> None:
    """Raise `Invalid` for routers whose choice depends on fixed groups of experts, or on a table of their ids."""
    router = layer.router
    groups = max(int(getattr(router, name, None) or 1) for name in ("n_group", "num_group"))
    if groups > 1:
        why = f"routes within {groups} fixed groups of experts"
    elif any(not table.is_floating_point() for table in router.buffers()):
        why = "sends tokens to experts by a table of their ids"
    else:
        return
    raise Invalid(
        f"{type(router).__name__} {why}, so that experts cannot be pruned singly; use a model of another family, or "
        "`connito library prune --method zeros`",
        reason=reasons_pb2.REASON_SELECTION_FAILED,
    )


def check_same(layer: MoELayer, call: Call, keep: list[int]) -> None:
    """Raise `Invalid` unless the layer's router, cut to `keep`, does what the whole one does among `keep`, on this call."""
    places = torch.tensor(keep, device=choice(call.output)[2].device)
    wanted = _table(call.among(places, layer.num_experts, alone=True), places, layer.num_experts, cut=False)
    router = copy.deepcopy(layer.router)
    cut_router(router, layer.num_experts, keep)
    args = tuple(_cut_argument(value, layer.num_experts, places) for value in call.args)
    kwargs = {name: _cut_argument(value, layer.num_experts, places) for name, value in call.kwargs.items()}
    try:
        with torch.no_grad():
            output = router.forward(*args, **kwargs)
            same = torch.allclose(_table(output, places, layer.num_experts, cut=True), wanted, rtol=1e-3, atol=1e-5)
    except (RuntimeError, IndexError, TypeError, ValueError):
        same = False
    if not same:
        raise Invalid(
            f"{type(layer.router).__name__} does not work with experts {keep} alone in layer {layer.index}: keep more "
            "experts a layer, or use a model of another family",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )


def _table(output: Any, places: torch.Tensor, total: int, *, cut: bool) -> torch.Tensor:
    """Return gate weights by expert, [T, N], from a router that numbers experts by their places in `keep` (cut) or not."""
    _, weights, ids = choice(output)
    rows, chosen = weights.reshape(-1, weights.shape[-1]).float(), ids.reshape(-1, ids.shape[-1])
    chosen = places[chosen] if cut else chosen
    return rows.new_zeros(len(rows), total).scatter_add_(1, chosen, rows)


def _cut_argument(value: Any, total: int, places: torch.Tensor) -> Any:
    """Return what a router is given beside the tokens, such as a bias that its block owns, for the experts left."""
    per_expert = isinstance(value, torch.Tensor) and value.dim() == 1 and len(value) == total
    return value[places] if per_expert else value


def remove_experts(layer: MoELayer, block: nn.Module, keep: list[int]) -> None:
    """Leave `keep` of a layer's experts, in place. `block`: the module that holds the experts and the router."""
    check_prunable(layer)
    total = layer.num_experts
    _cut_rows(layer.experts, total, keep)
    cut_router(layer.router, total, keep)
    for name, table in _tables(block, deep=False):
        tensor = table[name]
        if "bias" in name and tensor.dim() == 1 and len(tensor) == total:
            table[name] = _cut(tensor, 0, keep)
    set_counts(block, total, len(keep))


def cut_router(router: nn.Module, total: int, keep: list[int]) -> None:
    """Let a router know only `keep`, in place; its ids are places in `keep` then."""
    _cut_rows(router, total, keep)
    owner: Any = router
    if getattr(owner, "config", None) is not None:  # some read their counts from it, layer by layer
        owner.config = copy.copy(owner.config)
        set_counts(owner.config, total, len(keep))


def set_counts(owner: Any, total: int, left: int) -> None:
    """Write the number of experts `left` of `total`, and at most as many a token, wherever `owner` has them."""
    for name in CLASSES:
        size = getattr(owner, name, None)
        if isinstance(size, int) and (size == total or (name not in COUNTS and size > total)):
            setattr(owner, name, size - total + left)
    for name in PER_TOKEN:
        if isinstance(size := getattr(owner, name, None), int) and size > left:
            setattr(owner, name, left)


def _cut_rows(module: nn.Module, total: int, keep: list[int]) -> None:
    """Keep the rows `keep` of everything in `module` that has one per expert, and set its counts."""
    sizes = {total} | {
        size for name in CLASSES if isinstance(size := getattr(module, name, None), int) and size > total
    }
    for name, table in _tables(module):
        shape = table[name].shape
        dim = next((d for d, size in enumerate(shape[:2]) if size in sizes and (d == 0 or shape[0] == 1)), None)
        if dim is not None:
            table[name] = _cut(table[name], dim, [*keep, *range(total, shape[dim])])
    for part in module.modules():
        set_counts(part, total, len(keep))


def _tables(module: nn.Module, *, deep: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    for part in module.modules() if deep else (module,):
        for table in (part._parameters, part._buffers):
            for name in [name for name, tensor in table.items() if tensor is not None]:
                yield name, table


def _cut(tensor: torch.Tensor, dim: int, places: list[int]) -> torch.Tensor:
    rows = tensor.detach().index_select(dim, torch.tensor(places, device=tensor.device))
    return torch.nn.Parameter(rows, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else rows
