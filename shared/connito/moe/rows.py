"""Putting target rows into a full model and taking them out, and proving that nothing else moved."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from connito.errors import Invalid, VerificationFailed
from connito.moe.layout import MoELayer, as_targets, check_targets, require_moe_layers
from connito.moe.state import TargetState, raw_bytes, split_name, tensor_name
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn


def read_rows(model: nn.Module, selection: Any) -> TargetState:
    """Return θ: copies of the selected rows of a full model, on the CPU, `[n_selected, …]` per tensor, ascending expert id."""
    layers = require_moe_layers(model)
    targets = as_targets(selection)
    check_targets(layers, targets)
    state = {
        tensor_name(index, name): getattr(layers[index].experts, name).detach()[experts].cpu()
        for index, experts in targets.items()
        for name in layers[index].parameters
    }
    return {name: state[name] for name in sorted(state)}


def write_rows(model: nn.Module, selection: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Write θ into a full model in place. Raises `Invalid` before the first write if names or shapes do not fit."""
    import torch

    layers = require_moe_layers(model)
    targets = as_targets(selection)
    check_targets(layers, targets)
    check_state(layers, targets, state)
    with torch.no_grad():
        for name, rows in state.items():
            index, parameter = split_name(name)
            bank = getattr(layers[index].experts, parameter)
            for row, expert in zip(rows, targets[index], strict=True):
                bank[expert].copy_(row)


def check_state(
    layers: Mapping[int, MoELayer], targets: Mapping[int, list[int]], state: Mapping[str, torch.Tensor]
) -> None:
    """Raise `Invalid`, naming the first difference, unless a state has the tensors and shapes of the selection."""
    expected = {
        tensor_name(index, name): (len(experts), *getattr(layers[index].experts, name).shape[1:])
        for index, experts in targets.items()
        for name in layers[index].parameters
    }
    if set(state) != set(expected):
        odd = sorted(set(state) ^ set(expected))[0]
        where = "is missing from" if odd in expected else "does not belong in"
        raise Invalid(f"{odd} {where} this state", reason=reasons_pb2.REASON_WRONG_TENSORS)
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise Invalid(
                f"{name} has shape {tuple(state[name].shape)} where the selection needs {shape}",
                reason=reasons_pb2.REASON_WRONG_SHAPE,
            )


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Return SHA-256 of every tensor, and of every expert's row separately: `name` or `name[expert]` -> hex."""
    banks = {
        f"{layer.experts_name}.{name}" for layer in require_moe_layers(model).values() for name in layer.parameters
    }
    digests: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        if name in banks:
            digests |= {f"{name}[{expert}]": _digest(row) for expert, row in enumerate(tensor)}
        else:
            digests[name] = _digest(tensor)
    return digests


def row_names(model: nn.Module, selection: Any) -> set[str]:
    """Return the names that `fingerprint` gives the rows of the selected experts. Raises `Invalid` where there are none."""
    layers = require_moe_layers(model)
    check_targets(layers, as_targets(selection))
    return {
        f"{layers[index].experts_name}.{name}[{expert}]"
        for index, experts in as_targets(selection).items()
        for name in layers[index].parameters
        for expert in experts
    }


def assert_only_changed(before: Mapping[str, str], model: nn.Module, selection: Any) -> list[str]:
    """Compare with an earlier `fingerprint`; returns what changed, raises `VerificationFailed` for anything unselected."""
    allowed = row_names(model, selection)
    after = fingerprint(model)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    stray = [name for name in changed if name not in allowed]
    if stray:
        raise VerificationFailed(
            f"{len(stray)} tensors outside the selection changed, first {stray[0]}: the result is not an expert of this "
            "base; discard it",
            reason=reasons_pb2.REASON_WRONG_TENSORS,
        )
    return changed


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(raw_bytes(tensor)).hexdigest()


@dataclass(frozen=True)
class BaseDigests:
    """SHA-256 over a base model's tensors, in two parts: the rows an expert replaces, and everything else."""

    rest: str
    rows: str


def base_digests(model: nn.Module, layers: Any, digests: Mapping[str, str] | None = None) -> BaseDigests:
    """Return digests of `model` split at `layers` (expert ids by layer). `digests` spares hashing the model once more."""
    rows = row_names(model, layers)
    digests = fingerprint(model) if digests is None else digests
    parts = []
    for inside in (False, True):
        lines = (f"{name} {digests[name]}\n" for name in sorted(digests) if (name in rows) is inside)
        parts.append(hashlib.sha256("".join(lines).encode()).hexdigest())
    return BaseDigests(*parts)
