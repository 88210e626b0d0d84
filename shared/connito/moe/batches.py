"""Rows of a corpus as a model takes them: token ids, what they predict, where documents begin, and what counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from connito.data.packing import ROW, Rows, apart, tokens_of

if TYPE_CHECKING:
    from torch import nn

_KNOWN = "connito_separates"
# Where a model is whose layers lie on several devices: what goes in and comes out is there.
HOME = "connito_home"
# Of what a document in front does to the next one, so much may remain for a family to count as keeping them apart: rounding,
# by whether the model computes in float32. Beside another document a shorter type rounds differently than alone, and deep
# models add that up; between two documents in front, which one it is makes next to no difference in any type.
_REMAINS = {True: 1e-3, False: 0.25}
_LEAKS = 0.01


class Batch(NamedTuple):
    """ids and targets, int64 [B, L]. positions: int64 [B, L], from 0 in every document; None where no row has two of them.
    counts: bool [B, L], the predictions that are learned and measured; None for all.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        """Return how many predictions count."""
        return self.targets.numel() if self.counts is None else int(self.counts.sum())


def batch_of(rows: Rows, model: nn.Module) -> Batch:
    """Return rows [B, L + 1], plain ids or records of `connito.data.packing`, on the device of the model.

    A model that cannot keep documents of one row apart gets each in a row of its own: B is then their number.
    """
    rows = as_taken(rows, model)
    device = home_of(model)
    ids = torch.from_numpy(tokens_of(rows).astype(np.int64)).to(device)
    if rows.dtype != ROW:
        return Batch(ids[:, :-1], ids[:, 1:])
    positions = positions_of(rows[:, :-1], device)
    counts = torch.from_numpy(np.ascontiguousarray(rows["counts"][:, 1:])).to(device)
    return Batch(ids[:, :-1], ids[:, 1:], positions, counts)


def home_of(model: nn.Module) -> torch.device:
    """Return the device that a model takes ids on."""
    home: torch.device = getattr(model, HOME, None) or next(model.parameters()).device
    return home


def mixed(device: torch.device, *, bf16: bool) -> torch.autocast:
    """Return the block in which all that goes through a model does: under autocast with `bf16`, as weights of that type need."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16)


def as_taken(rows: Rows, model: nn.Module) -> Rows:
    """Return rows as the model can take them: each document in its own row, where it would mix those of one row."""
    return apart(rows)[0] if several(rows) and not separates(model) else rows


def several(rows: Rows) -> bool:
    """Return whether a row holds more than one document."""
    return rows.dtype == ROW and bool((rows["position"][..., 1:] == 0).any())


def positions_of(rows: Rows, device: torch.device) -> torch.Tensor | None:
    """Return the position of every token in its document, int64 [B, L]; None where no row has two documents."""
    if not several(rows):
        return None
    return torch.from_numpy(np.maximum(rows["position"], 0).astype(np.int64)).to(device)


def placed(positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Return the arguments that tell a model of transformers where documents begin."""
    return {} if positions is None else {"position_ids": positions}


def get_ready(model: nn.Module, rows: Rows) -> None:
    """Measure what `batch_of` has to know, where it has to: before anything listens to the model's routers."""
    if several(rows):
        separates(model)


def separates(model: nn.Module) -> bool:
    """Return whether documents of one row do not see each other when their positions begin anew.

    Families whose layers all are attention build such a mask from the positions; in others a state or a convolution runs on.
    Measured once, on two short documents, and remembered in the model.
    """
    known = getattr(model, _KNOWN, None)
    if known is None:
        known = _measured(model)
        setattr(model, _KNOWN, known)
    return bool(known)


def _measured(model: Any) -> bool:
    first, second = 9, 12
    device = home_of(model)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = (torch.arange(first + second, device=device)[None] * 7919 + 11) % vocabulary
    # Two rows: some kernels keep documents apart in a batch of one alone.
    ids = torch.cat([ids, ids.flip(1)])
    positions = torch.cat([torch.arange(first, device=device), torch.arange(second, device=device)]).repeat(2, 1)
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None) or model

    def states(part: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        out = body(input_ids=part, use_cache=False, **options)
        found: torch.Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
        return found[:, -second:].float()

    def distance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one - other).abs().mean(dim=-1)

    # The same second documents behind other first ones.
    others = torch.cat([(ids[:, :first] * 31 + 5) % vocabulary, ids[:, first:]], dim=1)
    try:
        with torch.no_grad():
            alone, behind = states(ids[:, first:]), states(ids, position_ids=positions)
            mixed, kept = distance(states(ids), alone), distance(behind, alone).amax(dim=0)
            leaks = distance(behind, states(others, position_ids=positions)).amax(dim=0)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return False
    exact = next(model.parameters()).dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    rounding = 4 * torch.finfo(torch.float32).eps * alone.abs().mean()
    # The first tokens by themselves: what a short convolution carries over is in them alone.
    return all(
        bool(found[part].mean() <= share * mixed[:, part].mean() + rounding)
        for found, share in ((kept, _REMAINS[exact]), (leaks, _LEAKS))
        for part in (slice(3), slice(None))
    )
