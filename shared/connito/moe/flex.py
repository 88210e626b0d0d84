"""Adding experts to a layer, with router rows of their own, beside what is there: opt-in and opt-out without retraining.

After FlexOlmo (Shi et al. 2025): every contributor trains experts and their router rows against one shared, frozen
anchor, so that any set of them can be joined at load time. Here the rows follow the anchor's in the order of their
digests: the joined model depends on the set alone, and without additions it is the anchor, bit for bit.

Shapes: N anchor experts, m additions to a layer, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid, NotFound
from connito.moe.layout import require_moe_layers
from connito.moe.prune import Keep, check_prunable, prune
from connito.moe.state import raw_bytes
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

# Router tensors with a row per expert that an addition may bring; `weight` [N, H] it must.
ROUTER = "router."


@dataclass(frozen=True)
class Addition:
    """One contributor's expert: by layer, its row of every expert tensor and, as `router.weight` [H], its router row."""

    name: str
    rows: Mapping[int, Mapping[str, torch.Tensor]]

    @property
    def digest(self) -> str:
        """SHA-256 over all rows: the identity by which additions are ordered."""
        state = hashlib.sha256()
        for layer in sorted(self.rows):
            for name in sorted(self.rows[layer]):
                state.update(f"{layer} {name} {tuple(self.rows[layer][name].shape)}\n".encode())
                state.update(raw_bytes(self.rows[layer][name]))
        return state.hexdigest()


def opt_in(model: nn.Module, additions: Sequence[Addition]) -> dict[str, Keep]:
    """Join `additions` to the anchor `model`, in place; returns the ids that each got, by layer.

    Raises `Invalid`, before anything is changed, for additions that leave out a layer or a tensor, bring one of another
    shape, or come twice.
    """
    layers = require_moe_layers(model)
    ordered = sorted(additions, key=lambda addition: addition.digest)
    names = [addition.name for addition in ordered]
    if len(set(names)) != len(names) or len({a.digest for a in ordered}) != len(ordered):
        raise Invalid(f"an addition is there twice: {', '.join(sorted(names))}; opt each in once")
    for addition in ordered:
        _check(addition, layers)
    ids = {
        addition.name: {index: [layer.num_experts + place] for index, layer in layers.items()}
        for place, addition in enumerate(ordered)
    }
    modules = dict(model.named_modules())
    for index, layer in layers.items():
        for module, prefix in ((layer.experts, ""), (layer.router, ROUTER)):
            _extend(module, prefix, layer.num_experts, [addition.rows[index] for addition in ordered])
        _count(modules[layer.experts_name.rpartition(".")[0]], layer.num_experts, len(ordered))
    config: Any = model.config
    _count(config, next(iter(layers.values())).num_experts, len(ordered))
    return ids


def opt_out(model: nn.Module, ids: Mapping[str, Keep], names: Sequence[str]) -> None:
    """Take additions out again, in place: what is left is what opting in the others alone would have given."""
    for name in names:
        if name not in ids:
            raise NotFound(f"{name} was not opted in; there are {', '.join(sorted(ids)) or 'none'}")
    layers = require_moe_layers(model)
    gone = {index: {ids[name][index][0] for name in names} for index in layers}
    # Pruning lowers top-k where too few are left; the anchor alone has enough.
    prune(model, {i: [e for e in range(layer.num_experts) if e not in gone[i]] for i, layer in layers.items()})


def _check(addition: Addition, layers: Mapping[int, Any]) -> None:
    if set(addition.rows) != set(layers):
        raise Invalid(f"{addition.name} has rows for layers {sorted(addition.rows)}, the anchor has {sorted(layers)}")
    for index, layer in layers.items():
        check_prunable(layer)
        wanted = {name: tuple(getattr(layer.experts, name).shape[1:]) for name in layer.parameters}
        tables = {**layer.router._parameters, **layer.router._buffers}
        wanted |= {
            ROUTER + name: tuple(tensor.shape[1:])
            for name, tensor in tables.items()
            if tensor is not None and tensor.ndim and tensor.shape[0] == layer.num_experts
        }
        given = {name: tuple(row.shape) for name, row in addition.rows[index].items()}
        if given != wanted:
            raise Invalid(
                f"{addition.name} brings {given} to layer {index}, where the anchor needs {wanted}",
                reason=reasons_pb2.REASON_WRONG_SHAPE,
            )


def _extend(module: Any, prefix: str, total: int, rows: Sequence[Mapping[str, torch.Tensor]]) -> None:
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None and tensor.ndim and tensor.shape[0] == total and rows:
                joined = torch.cat([tensor.detach(), *(row[prefix + name][None].to(tensor.dtype) for row in rows)])
                table[name] = torch.nn.Parameter(joined, requires_grad=False) if table is module._parameters else joined
    _count(module, total, len(rows))


def _count(owner: Any, total: int, more: int) -> None:
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if getattr(owner, name, None) == total:
            setattr(owner, name, total + more)
