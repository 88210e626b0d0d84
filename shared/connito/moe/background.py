"""The background expert: one frozen expert per adapted layer in place of all experts that are not in memory.

A token whose expert is absent should meet something like it. The usage-weighted mean of the absent experts is the one
expert that stands for all of them at the memory of one; experts that started as copies of each other, as upcycled and
branch-trained ones do, average well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from connito.moe.layout import as_targets, require_moe_layers
from connito.moe.state import TargetState, tensor_name

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import nn


def background(
    model: nn.Module,
    selection: Any,
    helpers: Mapping[int, Iterable[int]],
    usage: Mapping[int, npt.NDArray[Any]],
) -> TargetState:
    """Return `[1, …]` per tensor of every adapted layer: Σ_e u_e·W_e / Σ_e u_e over experts that are neither target
    nor helper.

    usage: [N] by layer, for example token scores of the target text. Where no absent expert was used at all they count
    alike; where none is absent the mean of all stands in, and is never asked for.
    """
    layers = require_moe_layers(model)
    made = {}
    for index, targets in as_targets(selection).items():
        there = {*targets, *helpers.get(index, ())}
        absent = [e for e in range(layers[index].num_experts) if e not in there] or list(
            range(layers[index].num_experts)
        )
        shares = weights_of(usage[index], absent)
        for name in layers[index].parameters:
            bank = getattr(layers[index].experts, name).detach()
            made[tensor_name(index, name)] = mean_row(lambda e, bank=bank: bank[e], shares)  # type: ignore[misc]
    return {name: made[name] for name in sorted(made)}


def weights_of(usage: npt.NDArray[Any], experts: Iterable[int]) -> dict[int, float]:
    """Return each expert's share of what all of them are used, or equal shares when none is."""
    chosen = list(experts)
    total = float(sum(max(0.0, float(usage[e])) for e in chosen))
    if total <= 0:
        return {e: 1 / len(chosen) for e in chosen}
    return {e: max(0.0, float(usage[e])) / total for e in chosen}


def mean_row(row: Callable[[int], torch.Tensor], shares: Mapping[int, float]) -> torch.Tensor:
    """Return Σ share·row as `[1, …]`: one expert in memory at a time, summed in float32, in the rows' own type."""
    import torch

    total, dtype = None, None
    for expert in sorted(shares):
        value = row(expert)
        dtype = value.dtype
        term = value.float() * shares[expert]
        total = term if total is None else total + term
    assert total is not None, "a layer has experts"
    return total.to(dtype if dtype is not None else torch.float32)[None]
