"""Many experts of one base resident in one model, chosen for each token: requests for different experts share a batch.

The rows of every expert lie beside the base's own banks, which are never touched or copied. A slot is one way to answer: the
base (slot 0), an expert, a composition, or several experts among which each token chooses. A table by layer maps (slot,
expert) to the row that stands for it; a token's slot picks the row (the remap of ExpertWeave, arXiv 2508.17624). Rows are
visited in the order of the expert they stand for, so that sums are those of the family's own loop over a merged model.

Shapes: T tokens, k experts per token, N experts in the layer, S slots, V variants, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from connito.errors import Invalid, NotFound
from connito.experts.arrow import prototype
from connito.experts.compose import Part, RowKey, Rows, base_rows, layers_of
from connito.experts.load import check_base
from connito.moe.implementation import Implementation, register
from connito.moe.layout import MoELayer, require_moe_layers
from connito.moe.rows import BaseDigests, base_digests, fingerprint

if TYPE_CHECKING:
    from connito.library.artifact import ExpertHeader

IMPLEMENTATION = "connito_table"
BASE = 0


@dataclass
class _Choice:
    """Variants of one expert that a slot's tokens choose among: unit vectors [V, H], and the place of each one's row."""

    prototypes: torch.Tensor
    rows: list[int]


@dataclass
class _Layer:
    """The rows beside one layer's banks. `own[slot][expert]` is a row of `rows`; what is not there is the base's."""

    layer: MoELayer
    rows: dict[int, tuple[int, dict[str, torch.Tensor]]] = field(default_factory=dict)
    own: dict[int, dict[int, int]] = field(default_factory=dict)
    choices: dict[int, dict[int, _Choice]] = field(default_factory=dict)
    # By place: (expert, its row beside the banks or None for the base's). Rebuilt on every change.
    places: list[tuple[int, dict[str, torch.Tensor] | None]] = field(default_factory=list)
    place_of: dict[int, int] = field(default_factory=dict)
    remap: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.int64))

    def rebuild(self, slots: int, device: torch.device) -> None:
        """Order the rows by expert, the base's first, and fill the remap [S, N]."""
        beside = sorted((expert, row) for row, (expert, _) in self.rows.items())
        order = sorted([(expert, -1) for expert in range(self.layer.num_experts)] + beside)
        self.places = [(expert, None if row < 0 else self.rows[row][1]) for expert, row in order]
        self.place_of = {row: place for place, (_, row) in enumerate(order) if row >= 0}
        base = torch.tensor([place for place, (_, row) in enumerate(order) if row < 0])
        self.remap = base.repeat(slots, 1)
        for slot, experts in self.own.items():
            for expert, row in experts.items():
                self.remap[slot, expert] = self.place_of[row]
        self.remap = self.remap.to(device)


class ExpertTable:
    """A model that answers with its base and with any of many experts. Not safe to change while the model computes."""

    def __init__(self, model: Any) -> None:
        """Take the bare base, hashing it once so that experts of another base are refused."""
        self.model, self.device = model, next(model.parameters()).device
        self.slots: dict[str, int] = {}
        self._digests = fingerprint(model)
        self._layers = {index: _Layer(layer) for index, layer in require_moe_layers(model).items()}
        self._free: list[int] = []
        self._rows = 0
        # Of the tokens [T] that the next forward pass computes; None: all of them the base's.
        self.token_slots: torch.Tensor | None = None
        register(IMPLEMENTATION, table_forward)
        for layer in self._layers.values():
            layer.rebuild(1, self.device)
            module: Any = layer.layer.experts
            module.config, module.connito_table = Implementation(module.config, IMPLEMENTATION), (self, layer)

    def check(self, header: ExpertHeader) -> None:
        """Raise `Invalid` unless an expert is of this base."""
        for layer in header.layers:
            if (
                layer not in self._layers
                or max(header.layers[layer], default=0) >= self._layers[layer].layer.num_experts
            ):
                raise Invalid(f"this model has no layer {layer} with these experts: the expert is of another base")
        check_base(header, self._base_digests(header.layers))

    def origin(self, parts: Sequence[Part]) -> Rows:
        """Return the base's own rows that the parts replace."""
        return base_rows(self.model, parts)

    def add(self, name: str, rows: Mapping[RowKey, torch.Tensor]) -> int:
        """Put an expert's (or a composition's) rows in, copied; returns its slot."""
        slot = self._slot(name)
        for index, experts in layers_of(rows).items():
            for expert in experts:
                self._layers[index].own.setdefault(slot, {})[expert] = self._put(index, expert, rows)
        return self._changed(slot)

    def add_choice(self, name: str, parts: Sequence[Part]) -> int:
        """Put several experts in, among which each token takes the one whose prototype it is most aligned with (Arrow, top 1)."""
        slot, origin = self._slot(name), self.origin(parts)
        for index, experts in layers_of({key: None for part in parts for key in part.rows}).items():
            layer = self._layers[index]
            turned = bool(getattr(layer.layer.experts, "is_transposed", False))
            for expert in experts:
                having = [part for part in parts if any(key[:2] == (index, expert) for key in part.rows)]
                vectors = [prototype(part.rows, origin, (index, expert), transposed=turned) for part in having]
                rows = [self._put(index, expert, part.rows) for part in having]
                choice = _Choice(torch.stack(vectors).float().to(self.device), rows)
                layer.choices.setdefault(slot, {})[expert] = choice
        return self._changed(slot)

    def remove(self, name: str) -> None:
        """Forget an expert: its rows are freed, and its slot is somebody else's. Raises `NotFound`."""
        if name not in self.slots:
            raise NotFound(f"{name} is not loaded; loaded are {', '.join(sorted(self.slots)) or 'none'}")
        slot = self.slots.pop(name)
        self._free.append(slot)
        for layer in self._layers.values():
            gone = [*layer.own.pop(slot, {}).values()]
            gone += [row for choice in layer.choices.pop(slot, {}).values() for row in choice.rows]
            for row in gone:
                del layer.rows[row]
            layer.rebuild(self._capacity(), self.device)

    def row_bytes(self) -> int:
        """Return the bytes of all rows beside the base's."""
        every = (row for layer in self._layers.values() for _, row in layer.rows.values())
        return sum(tensor.nbytes for row in every for tensor in row.values())

    def _capacity(self) -> int:
        return 1 + len(self.slots) + len(self._free)

    def _slot(self, name: str) -> int:
        if name in self.slots:
            raise Invalid(f"{name} is loaded already")
        slot = self._free.pop() if self._free else 1 + len(self.slots)
        self.slots[name] = slot
        return slot

    def _put(self, index: int, expert: int, rows: Mapping[RowKey, torch.Tensor]) -> int:
        names = self._layers[index].layer.parameters
        self._rows += 1
        # Copied: rows may be mapped from a file that is replaced one day.
        own = {name: rows[index, expert, name].detach().to(self.device, copy=True) for name in names}
        self._layers[index].rows[self._rows] = (expert, own)
        return self._rows

    def _changed(self, slot: int) -> int:
        for layer in self._layers.values():
            layer.rebuild(self._capacity(), self.device)
        return slot

    def _base_digests(self, layers: Mapping[int, Sequence[int]]) -> BaseDigests:
        return base_digests(self.model, layers, self._digests)


def table_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return Σ_k w_k · expert_k(x), [T, H], each token with the rows of its own slot."""
    table, layer = self.connito_table
    k, slots = top_k_index.shape[-1], table.token_slots
    if slots is None:
        places = layer.remap[BASE][top_k_index]
    else:
        places = layer.remap[slots[:, None], top_k_index]
        if layer.choices:
            _choose(layer, slots, hidden_states, top_k_index, places)
    ordered, order = places.reshape(-1).sort(stable=True)
    found, counts = torch.unique_consecutive(ordered, return_counts=True)
    weights, output, start = top_k_weights.reshape(-1), torch.zeros_like(hidden_states), 0
    for place, count in zip(found.tolist(), counts.tolist(), strict=True):
        part = order[start : start + count]
        start, token = start + count, part // k
        current = _expert(self, hidden_states[token], *layer.places[place]) * weights[part, None]
        output.index_add_(0, token, current.to(output.dtype))
    return output


def _choose(layer: _Layer, slots: torch.Tensor, x: torch.Tensor, experts: torch.Tensor, places: torch.Tensor) -> None:
    """Write the places of the variants that tokens of choosing slots take."""
    for slot, choices in layer.choices.items():
        mine = slots == slot
        if not bool(mine.any()):
            continue
        for expert, choice in choices.items():
            token, column = torch.where((experts == expert) & mine[:, None])
            best = (x[token].float() @ choice.prototypes.T).abs().argmax(dim=-1)
            at = torch.tensor([layer.place_of[row] for row in choice.rows], device=places.device)
            places[token, column] = at[best]


def _expert(self: Any, x: torch.Tensor, expert: int, row: dict[str, torch.Tensor] | None) -> torch.Tensor:
    x = _linear(self, x, "gate_up_proj" if self.has_gate else "up_proj", expert, row)
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _linear(self, x, "down_proj", expert, row)
    return self.post_expert_norm(x) if self.has_post_expert_norm else x


def _linear(self: Any, x: torch.Tensor, name: str, expert: int, row: dict[str, torch.Tensor] | None) -> torch.Tensor:
    weight = getattr(self, name)[expert] if row is None else row[name]
    y = x @ weight if self.is_transposed else F.linear(x, weight)
    if self.has_bias:
        y = y + (getattr(self, f"{name}_bias")[expert] if row is None else row[f"{name}_bias"])
    return y
