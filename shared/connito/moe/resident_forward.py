"""The forward pass of resident experts: which slots of a batch go where, and the products of each expert or of each bank.

Shapes: T tokens, k experts per token, N experts in the layer, R rows in all banks of it, targets first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F

from connito.moe.four_bit import FourBit, frozen_linear
from connito.moe.residency import BACKGROUND, HELPER, TARGET

# Rows that are in memory in a router's float32 at once.
TILE_ROWS = 4096
LOOP, GROUPED = "connito_resident", "connito_resident_grouped"


@dataclass(frozen=True)
class Slots:
    """The slots of a batch whose expert is in memory, by bank and row, then by token.

    `order` begins with their positions among all T·k slots; the part of the row at place p is order[ends[p]:ends[p + 1]].
    """

    order: torch.Tensor
    ends: list[int]
    k: int

    @classmethod
    def sort(cls, ids: torch.Tensor, place: torch.Tensor, rows: int) -> Slots:
        """Sort expert ids [T, k] by their places [N + 1] among `rows`. The device is waited for once."""
        places, order = place[ids].view(-1).sort(stable=True)
        ends = torch.searchsorted(places, torch.arange(rows, device=ids.device), right=True)
        return cls(order, [0, *ends.tolist()], ids.shape[-1])


def loop_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return Σ_k w_k · expert_k(x) over resident experts, [T, hidden]; an id without a resident adds nothing.

    One matrix product per resident expert straight from its bank: no bank is concatenated or indexed per call. Experts
    are visited by ascending id and summed like the family's own loop, so that parity with the full model is exact.
    """
    output = torch.zeros_like(hidden_states)
    slots = Slots.sort(top_k_index, self.connito_place, self.connito_rows)
    for place, bank, row in self.connito_where:
        part = slots.order[slots.ends[place] : slots.ends[place + 1]]
        if part.numel() == 0:
            continue
        token = part // slots.k
        current = _expert(self, hidden_states[token], bank, row) * top_k_weights.reshape(-1)[part, None]
        output = output.index_add(0, token, current.to(output.dtype))
    return output


def grouped_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Return the same with one grouped product for all experts of a bank, equal to rounding.

    A token's experts are summed in float32. A bank in four bits is unpacked expert by expert all the same, and what a GPU
    has no grouped kernel for takes the loop.
    """
    if hidden_states.is_cuda and not _has_kernels(self, hidden_states):
        return loop_forward(self, hidden_states, top_k_index, top_k_weights)
    slots, parts, first = Slots.sort(top_k_index, self.connito_place, self.connito_rows), [], 0
    for bank, rows in _banks(self):
        ends = slots.ends[first : first + rows + 1]
        if ends[-1] > ends[0]:
            token = slots.order[ends[0] : ends[-1]] // slots.k
            parts.append(_bank(self, hidden_states[token], bank, [end - ends[0] for end in ends]))
        first += rows
    order = slots.order[: slots.ends[first]]
    found = torch.cat(parts) if parts else hidden_states[:0]
    weighted: torch.Tensor = _Weighted.apply(  # type: ignore[no-untyped-call]
        found, top_k_weights.reshape(-1)[order], hidden_states.dtype
    )
    each = hidden_states.new_zeros(top_k_index.numel(), hidden_states.shape[-1]).index_copy(0, order, weighted)
    return each.view(*top_k_index.shape, -1).sum(dim=1)


class _Weighted(torch.autograd.Function):
    """Rows [n, hidden] times a router's weights [n], in the wider type of both, of which a few rows are in memory at once."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(rows, weights)
        out = rows.new_empty(rows.shape, dtype=dtype)
        for part in _parts(len(rows)):
            out[part] = rows[part] * weights[part, None]
        return out

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (rows, weights), (of_rows, of_weights, _) = ctx.saved_tensors, ctx.needs_input_grad
        wide = torch.promote_types(rows.dtype, weights.dtype)
        to_rows = torch.empty_like(rows) if of_rows else None
        to_weights = torch.empty_like(weights) if of_weights else None
        for part in _parts(len(rows)):
            gradient = upstream[part].to(wide)
            if to_weights is not None:
                to_weights[part] = (gradient * rows[part]).sum(dim=-1)
            if to_rows is not None:
                to_rows[part] = gradient * weights[part, None]
        return to_rows, to_weights, None


def _parts(rows: int) -> list[slice]:
    return [slice(start, start + TILE_ROWS) for start in range(0, rows, TILE_ROWS)]


def _banks(self: Any) -> list[tuple[str, int]]:
    """Return (prefix, rows) of the banks, in the order of places."""
    found = []
    for bank in (TARGET, HELPER, BACKGROUND):
        held = getattr(self, f"{bank}down_proj", None)
        if held is not None:
            found.append((bank, len(held.codes) if isinstance(held, FourBit) else len(held)))
    return found


def _expert(self: Any, x: torch.Tensor, bank: str, row: int) -> torch.Tensor:
    """Return one expert's output for its tokens [t, hidden]."""
    return _between(self, x, lambda y, name: _linear(self, y, bank, row, name))


def _bank(self: Any, x: torch.Tensor, bank: str, ends: list[int]) -> torch.Tensor:
    """Return the same for the tokens [t, hidden] of all rows of a bank, of which row i has ends[i] to ends[i + 1]."""
    if isinstance(getattr(self, f"{bank}down_proj"), FourBit):
        spans = [(row, *span) for row, span in enumerate(pairwise(ends)) if span[0] < span[1]]
        return torch.cat([_expert(self, x[start:stop], bank, row) for row, start, stop in spans])
    offsets = torch.tensor(ends[1:], dtype=torch.int32).to(x.device, non_blocking=True)
    return _between(self, x, lambda y, name: _grouped(self, y, bank, offsets, name))


def _between(self: Any, x: torch.Tensor, linear: Callable[[torch.Tensor, str], torch.Tensor]) -> torch.Tensor:
    """Return an expert's output with whatever the family has: gate, biases, transposed weights, post norm."""
    x = linear(x, "gate_up_proj" if self.has_gate else "up_proj")
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = linear(x, "down_proj")
    return self.post_expert_norm(x) if self.has_post_expert_norm else x


def _linear(self: Any, x: torch.Tensor, bank: str, row: int, name: str) -> torch.Tensor:
    rows: torch.Tensor | FourBit = getattr(self, bank + name)
    bias = getattr(self, f"{bank}{name}_bias")[row] if self.has_bias else None
    if isinstance(rows, FourBit):
        return frozen_linear(x, rows, row, bias, self.is_transposed)
    weight = rows[row]
    if not self.is_transposed:
        return F.linear(x, weight, bias)
    product: torch.Tensor = x @ weight
    return product if bias is None else product + bias


def _grouped(self: Any, x: torch.Tensor, bank: str, ends: torch.Tensor, name: str) -> torch.Tensor:
    weight: torch.Tensor = getattr(self, bank + name)
    dtype = _computed(x, weight)
    weight = weight.to(dtype) if self.is_transposed else weight.to(dtype).transpose(-2, -1)
    product: torch.Tensor = F.grouped_mm(x.to(dtype), weight, offs=ends)
    if not self.has_bias:
        return product
    row = torch.searchsorted(ends, torch.arange(len(x), device=x.device, dtype=ends.dtype), right=True)
    biases: torch.Tensor = getattr(self, f"{bank}{name}_bias")
    return product + biases[row]


def _computed(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Return the type to multiply in: autocast does not know grouped products."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _has_kernels(self: Any, x: torch.Tensor) -> bool:
    """Return whether a GPU multiplies these experts in groups: bfloat16, rows that begin at multiples of 16 bytes."""
    held = [getattr(self, f"{bank}down_proj") for bank, _ in _banks(self)]
    return all(
        _computed(x, rows) == torch.bfloat16 and rows.shape[-1] % 8 == 0 and rows.shape[-2] % 8 == 0
        for rows in held
        if not isinstance(rows, FourBit)
    )
