"""Take experts out of a layer: their rows in the bank, and whatever the family's router and block keep one of per expert.

What a router does without an expert follows from the router itself (`connito.moe.router`); a router that is cut to the
experts left has to do the same, or the family cannot be cut and is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
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
# Whose a table is, in its name; the bank's own have no prefix.
ROUTER, BLOCK = "router.", "block."
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


def remove_experts(layer: MoELayer, keep: list[int]) -> None:
    """Leave `keep` of a layer's experts, in place."""
    check_prunable(layer)
    total = layer.num_experts
    for part in tables(layer):
        part.replace(_cut(part.tensor, part.dim, [*keep, *range(total, part.tensor.shape[part.dim])]))
    count_again(layer, len(keep))


def cut_router(router: nn.Module, total: int, keep: list[int]) -> None:
    """Let a router know only `keep`, in place; its ids are places in `keep` then."""
    for part in _tables(router, total, ROUTER):
        part.replace(_cut(part.tensor, part.dim, [*keep, *range(total, part.tensor.shape[part.dim])]))
    _count_router(router, total, len(keep))


def count_again(layer: MoELayer, left: int) -> None:
    """Write the new number of experts wherever the layer's modules have it."""
    for part in layer.experts.modules():
        set_counts(part, layer.num_experts, left)
    _count_router(layer.router, layer.num_experts, left)
    set_counts(layer.block, layer.num_experts, left)


def _count_router(router: nn.Module, total: int, left: int) -> None:
    for part in router.modules():
        set_counts(part, total, left)
    owner: Any = router
    if getattr(owner, "config", None) is not None:  # some read their counts from it, layer by layer
        owner.config = copy.copy(owner.config)
        set_counts(owner.config, total, left)


def set_counts(owner: Any, total: int, left: int) -> None:
    """Write the number of experts `left` of `total`, and at most as many a token, wherever `owner` has them."""
    for name in CLASSES:
        size = getattr(owner, name, None)
        if isinstance(size, int) and (size == total or (name not in COUNTS and size > total)):
            setattr(owner, name, size - total + left)
    for name in PER_TOKEN:
        if isinstance(size := getattr(owner, name, None), int) and size > left:
            setattr(owner, name, left)


@dataclass(frozen=True)
class Table:
    """A tensor of a layer with one row an expert along `dim`; `name` says whose it is: "", "router." or "block." and a path."""

    name: str
    owner: dict[str, Any]
    key: str
    dim: int

    @property
    def tensor(self) -> torch.Tensor:
        """Return the tensor as it is now."""
        found: torch.Tensor = self.owner[self.key]
        return found

    def replace(self, tensor: torch.Tensor) -> None:
        """Put another in its place, as a parameter if it was one."""
        frozen = isinstance(self.tensor, torch.nn.Parameter)
        self.owner[self.key] = torch.nn.Parameter(tensor, requires_grad=False) if frozen else tensor


def tables(layer: MoELayer) -> list[Table]:
    """Return everything that the layer keeps one row of per expert: the bank, the router's tables, biases of the block."""
    total = layer.num_experts
    beside = [
        part
        for part in _tables(layer.block, total, BLOCK, deep=False)
        if "bias" in part.key and part.tensor.dim() == 1 and len(part.tensor) == total
    ]
    return [*_tables(layer.experts, total, ""), *_tables(layer.router, total, ROUTER), *beside]


def _tables(module: nn.Module, total: int, prefix: str, *, deep: bool = True) -> list[Table]:
    sizes = {total} | {
        size for name in CLASSES if isinstance(size := getattr(module, name, None), int) and size > total
    }
    found = []
    for path, part in module.named_modules() if deep else (("", module),):
        for owner in (part._parameters, part._buffers):
            for key, tensor in owner.items():
                shape = [] if tensor is None else list(tensor.shape)
                dim = next((d for d, size in enumerate(shape[:2]) if size in sizes and (d == 0 or shape[0] == 1)), None)
                if dim is not None:
                    found.append(Table(f"{prefix}{path}.{key}" if path else f"{prefix}{key}", owner, key, dim))
    return found


def _cut(tensor: torch.Tensor, dim: int, places: list[int]) -> torch.Tensor:
    return tensor.detach().index_select(dim, torch.tensor(places, device=tensor.device))
