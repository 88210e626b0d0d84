"""Several experts of one base in one model: which rows they share, how these are merged, and taking each out again.

Shapes: an expert is a set of rows, one tensor [...] per (layer, expert, parameter); δ = θ − θ_base of a row.
Everything is computed per row in float64 over the experts in the order of their digests, so that the result does not
depend on the order in which they were given, and a row that one expert alone decides is that expert's, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid, NotFound, VerificationFailed
from connito.experts.load import check_base
from connito.library.artifact import EXPERT_FILE, ExpertHeader, read_header
from connito.moe.rows import base_digests, fingerprint, read_rows, write_rows
from connito.moe.state import TargetState, load_state, split_name, tensor_name
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    from torch import nn

RowKey = tuple[int, int, str]
Rows = dict[RowKey, torch.Tensor]
METHODS = ("linear", "sum", "ties")


@dataclass(frozen=True)
class Part:
    """One expert that goes into a composition. `rows` are its θ."""

    name: str
    digest: str
    rows: Mapping[RowKey, torch.Tensor] = field(repr=False)
    header: ExpertHeader | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Conflict:
    """Two experts that touch one row: cosine of their δ, and the share of coordinates moved by both on which signs agree."""

    layer: int
    expert: int
    names: tuple[str, str]
    cosine: float
    sign_agreement: float


@dataclass(frozen=True)
class Recipe:
    """Settings for merging experts where they change the same rows.

    linear  weighted mean of those that touch the row (weights are normalised per row)
    sum     base + Σ w_i δ_i, weights as they are (task arithmetic; what LoRAHub learns weights for)
    ties    trim each δ to its `density` largest values, elect a sign per coordinate, mean of those that agree, times
            `scale` (TIES-Merging, Yadav et al. 2023, algorithm 1)
    """

    method: str = "linear"
    density: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.method not in METHODS:
            raise Invalid(f"unknown merge method {self.method!r}: use {', '.join(METHODS)}")
        if not 0 < self.density <= 1:
            raise Invalid(f"the density is {self.density}, but it is a share: give a number above 0 and at most 1")


def read_part(path: Path) -> Part:
    """Read an expert file, or the folder of an export, as a part. Raises `NotFound` or `Invalid`."""
    file = path / EXPERT_FILE if path.is_dir() else path
    if not file.is_file():
        raise NotFound(f"there is no expert at {path}; get one with `connito library export`")
    header = read_header(file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Part(f"{header.domain}-{digest[:12]}", digest, rows_of(header.layers, load_state(file)), header)


def rows_of(layers: Mapping[int, Sequence[int]], state: Mapping[str, torch.Tensor]) -> Rows:
    """Split a target state into its rows, which are in ascending expert id."""
    out: Rows = {}
    for name, tensor in state.items():
        layer, parameter = split_name(name)
        if len(tensor) != len(layers.get(layer, ())):
            raise Invalid(
                f"{name} has {len(tensor)} rows for {len(layers.get(layer, ()))} experts",
                reason=reasons_pb2.REASON_WRONG_SHAPE,
            )
        out |= {(layer, expert, parameter): row for expert, row in zip(sorted(layers[layer]), tensor, strict=True)}
    return out


def layers_of(rows: Mapping[RowKey, Any]) -> dict[int, list[int]]:
    """Return expert ids by layer, both ascending."""
    layers: dict[int, set[int]] = {}
    for layer, expert, _ in rows:
        layers.setdefault(layer, set()).add(expert)
    return {layer: sorted(layers[layer]) for layer in sorted(layers)}


def state_of(rows: Mapping[RowKey, torch.Tensor]) -> TargetState:
    """Return the inverse of `rows_of`."""
    layers = layers_of(rows)
    names = sorted({(layer, parameter) for layer, _, parameter in rows})
    state = {
        tensor_name(layer, parameter): torch.stack([rows[layer, expert, parameter] for expert in layers[layer]])
        for layer, parameter in names
    }
    return {name: state[name] for name in sorted(state)}


def base_rows(model: nn.Module, parts: Sequence[Part]) -> Rows:
    """Return θ_base of every row that some part touches, from a model that holds none of them."""
    layers = layers_of({key: None for part in parts for key in part.rows})
    return rows_of(layers, read_rows(model, layers))


def conflicts(parts: Sequence[Part], base: Mapping[RowKey, torch.Tensor]) -> list[Conflict]:
    """Return every pair of parts on every expert that both touch, by layer and expert."""
    found = []
    for one, other in combinations(_ordered(parts), 2):
        shared = sorted(one.rows.keys() & other.rows.keys())
        for place in sorted({key[:2] for key in shared}):
            keys = [key for key in shared if key[:2] == place]
            a, b = (torch.cat([_delta(part, base, key).flatten() for key in keys]) for part in (one, other))
            found.append(Conflict(*place, (one.name, other.name), *_agreement(a, b)))
    return sorted(found, key=lambda c: (c.layer, c.expert, c.names))


def _agreement(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    norms = float(a.norm() * b.norm())
    both = (a != 0) & (b != 0)
    agree = float((a.sign() == b.sign())[both].double().mean()) if bool(both.any()) else 1.0
    return (float(a @ b) / norms if norms else 0.0), agree


def merge(
    parts: Sequence[Part],
    base: Mapping[RowKey, torch.Tensor],
    recipe: Recipe | None = None,
    weights: Mapping[str, float] | None = None,
) -> Rows:
    """Return θ of every row that a part touches. `weights` by part name; 1 for all without them.

    Identities: one part with weight 1 comes back bit for bit, as does a part among others of weight 0 where no other
    row is asked for; parts that share no row are simply put side by side. Raises `Invalid` without parts, for weights of
    unknown parts, for two parts of one name, and where `linear` weights of a row sum to 0.
    """
    recipe, weights = recipe or Recipe(), dict(weights or {part.name: 1.0 for part in parts})
    names = [part.name for part in parts]
    if not parts or len(set(names)) != len(names) or not set(weights) <= set(names):
        raise Invalid(f"cannot merge {names} with weights for {sorted(weights)}: give each expert once, by its id")
    ordered = _ordered(parts)
    limits = {part.name: _trim_limit(part, base, recipe.density) for part in ordered} if recipe.method == "ties" else {}
    out: Rows = {}
    for key in sorted({key for part in ordered for key in part.rows}):
        if key not in base:
            raise Invalid(f"the base has no row {key}: these experts are of another base")
        here = [(part, float(weights.get(part.name, 0.0))) for part in ordered if key in part.rows]
        out[key] = _merge_row(key, [item for item in here if item[1] != 0.0], base, recipe, limits)
    return out


def _merge_row(
    key: RowKey,
    here: list[tuple[Part, float]],
    base: Mapping[RowKey, torch.Tensor],
    recipe: Recipe,
    limits: Mapping[str, float],
) -> torch.Tensor:
    origin = base[key]
    if not here:
        return origin.clone()
    alone = len(here) == 1 and (recipe.method == "linear" or here[0][1] == 1.0)
    if alone and (recipe.method != "ties" or (recipe.density == 1.0 and recipe.scale == 1.0)):
        return here[0][0].rows[key].clone()
    deltas = [_delta(part, base, key) for part, _ in here]
    if recipe.method == "ties":
        deltas = [d * (d.abs() >= limits[part.name]) for d, (part, _) in zip(deltas, here, strict=True)]
        moved = _elected_mean(deltas, [weight for _, weight in here]) * recipe.scale
    else:
        total = sum(weight for _, weight in here) if recipe.method == "linear" else 1.0
        if total == 0:
            raise Invalid(f"the weights of row {key} sum to 0; use `sum`, or other weights")
        moved = torch.zeros_like(deltas[0])
        for delta, (_, weight) in zip(deltas, here, strict=True):
            moved = moved + delta * (weight / total)
    return (origin.double() + moved).to(origin.dtype)


def _elected_mean(deltas: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """Return, per coordinate, the weighted mean of the values whose sign has more weighted mass."""
    total = torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        total = total + delta * weight
    sign = total.sign()
    kept, mass = torch.zeros_like(total), torch.zeros_like(total)
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = ((delta * weight).sign() == sign) & (delta != 0)
        kept = kept + torch.where(agrees, delta * weight, 0.0)
        mass = mass + agrees * abs(weight)
    return kept / mass.clamp_min(1e-300)


def _trim_limit(part: Part, base: Mapping[RowKey, torch.Tensor], density: float) -> float:
    """Return the magnitude from which on a coordinate is among the `density` largest of the whole expert."""
    if density >= 1.0:
        return 0.0
    magnitudes = torch.cat([_delta(part, base, key).abs().flatten() for key in sorted(part.rows)])
    kept = max(1, round(density * len(magnitudes)))
    return float(magnitudes.kthvalue(len(magnitudes) - kept + 1).values)


def _delta(part: Part, base: Mapping[RowKey, torch.Tensor], key: RowKey) -> torch.Tensor:
    if part.rows[key].shape != base[key].shape:
        raise Invalid(
            f"row {key} of {part.name} has shape {tuple(part.rows[key].shape)}, the base's {tuple(base[key].shape)}",
            reason=reasons_pb2.REASON_WRONG_SHAPE,
        )
    return part.rows[key].double() - base[key].double()


def _ordered(parts: Sequence[Part]) -> list[Part]:
    return sorted(parts, key=lambda part: (part.digest, part.name))


class Composition:
    """A model with any number of experts in it. Each can be added and removed in any order, without retraining.

    The model is always a function of the *set* of experts: after every step the touched rows are merged anew from the
    base's own rows, so that add-then-remove leaves the base bit for bit.
    """

    def __init__(self, model: nn.Module, recipe: Recipe | None = None) -> None:
        """Take `model`, the bare base, and hash it once so that experts of another base are refused."""
        self.model, self.recipe = model, recipe or Recipe()
        self.parts: dict[str, Part] = {}
        self.weights: dict[str, float] = {}
        self._base: Rows = {}
        self._before = fingerprint(model)

    def add(self, part: Part, weight: float = 1.0) -> list[Conflict]:
        """Put an expert in; returns its conflicts with those already there. `Invalid`, before any write, if it cannot."""
        if part.name in self.parts:
            raise Invalid(f"{part.name} is in this composition already")
        if part.header is not None:
            check_base(part.header, base_digests(self.model, part.header.layers, self._before))
        layers = layers_of(part.rows)
        fresh = rows_of(layers, read_rows(self.model, layers))
        known = {**{key: row for key, row in fresh.items() if key not in self._base}, **self._base}
        parts, weights = {**self.parts, part.name: part}, {**self.weights, part.name: weight}
        rows = merge(list(parts.values()), known, self.recipe, weights)
        self._write(rows)
        self.parts, self.weights, self._base = parts, weights, known
        return [c for c in conflicts(list(parts.values()), known) if part.name in c.names]

    def remove(self, name: str) -> None:
        """Take an expert out. Raises `NotFound` for one that is not in."""
        if name not in self.parts:
            raise NotFound(f"{name} is not in this composition; it has {', '.join(sorted(self.parts)) or 'none'}")
        del self.parts[name], self.weights[name]
        rows = merge(list(self.parts.values()), self._base, self.recipe, self.weights) if self.parts else {}
        self._write({key: rows.get(key, row) for key, row in self._base.items()})
        self._base = {key: row for key, row in self._base.items() if key in rows}

    def verify(self) -> list[str]:
        """Return the tensors that differ from the base. Raises `VerificationFailed` if any is not a row of the parts."""
        after = fingerprint(self.model)
        changed = sorted(name for name in after if after[name] != self._before.get(name))
        allowed = _row_names(self.model, self._base)
        stray = [name for name in changed if name not in allowed]
        if stray:
            raise VerificationFailed(
                f"{len(stray)} tensors outside the composed experts changed, first {stray[0]}: load the base again",
                reason=reasons_pb2.REASON_WRONG_TENSORS,
            )
        return changed

    def _write(self, rows: Mapping[RowKey, torch.Tensor]) -> None:
        write_rows(self.model, layers_of(rows), state_of(rows))


def _row_names(model: nn.Module, rows: Mapping[RowKey, Any]) -> set[str]:
    from connito.moe.layout import require_moe_layers

    layers = require_moe_layers(model)
    return {f"{layers[layer].experts_name}.{parameter}[{expert}]" for layer, expert, parameter in rows}
