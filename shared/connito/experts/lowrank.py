"""Smaller experts instead of fewer: weights set to zero by use, and experts stored as products of two thin matrices.

MoE-Pruner (Xie et al. 2024, eq. 6): score |W_ij| · ‖x_j · g‖ over calibration tokens, where g is the gate weight with
which the token came; the lowest share of every output row is set to zero.
MoE-I² (Yang et al. 2024, section 3.2): W ≈ A B by truncated SVD, with more rank for experts that are used more.

Shapes: N experts, W [N, out, in], rank r: A [N, out, r], B [N, r, in].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from connito.errors import Invalid
from connito.experts.tape import Tape, each_layer

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

MAPS = ("gate_up_proj", "up_proj", "down_proj")


def sparsify(model: nn.Module, sequences: npt.NDArray[Any], share: float) -> dict[int, float]:
    """Set `share` of every output row of every expert to zero, in place; returns the zeros' share by layer.

    Experts that no calibration token reached are pruned by magnitude alone. share 0 changes no bit.
    """
    if not 0 <= share < 1:
        raise Invalid(f"the share of weights to drop is {share}: give a number from 0 to below 1")

    def look(tape: Tape) -> float:
        for expert in range(tape.layer.num_experts):
            _sparsify_expert(tape, expert, share)
        banks = [getattr(tape.layer.experts, name) for name in tape.layer.parameters if name in MAPS]
        return sum(int((bank == 0).sum()) for bank in banks) / sum(int(bank.numel()) for bank in banks)

    return each_layer(model, sequences, look)


def _sparsify_expert(tape: Tape, expert: int, share: float) -> None:
    experts: Any = tape.layer.experts
    token, slot = torch.where(tape.ids == expert)
    x, gate = tape.inputs[token], tape.weights[token, slot, None]
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    with torch.no_grad():
        weight, bias = _map(experts, up, expert), getattr(experts, f"{up}_bias", None)
        _zero_lowest(weight, x * gate, share)
        if len(x):
            hidden = torch.nn.functional.linear(x, weight, None if bias is None else bias[expert])
            x = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        _zero_lowest(_map(experts, "down_proj", expert), x * gate if len(x) else x, share)


def _map(experts: Any, name: str, expert: int) -> torch.Tensor:
    """Return an expert's map as a view [out, in], also of a family that stores [in, out]."""
    weight: torch.Tensor = getattr(experts, name)[expert]
    return weight.mT if getattr(experts, "is_transposed", False) else weight


def _zero_lowest(weight: torch.Tensor, inputs: torch.Tensor, share: float) -> None:
    count = int(share * weight.shape[-1])
    if count:
        scores = weight.abs().float()
        if len(inputs):
            scores = scores * inputs.float().norm(dim=0)
        weight.scatter_(-1, scores.topk(count, dim=-1, largest=False).indices, 0)


def factorise(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a [out, r], B [r, in] with the least ‖W − A B‖_F (Eckart–Young); exact, up to rounding, at full rank."""
    if not 1 <= rank <= min(weight.shape):
        raise Invalid(f"a matrix of shape {tuple(weight.shape)} has no factors of rank {rank}")
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(weight.dtype), (root[:, None] * vh[:rank]).to(weight.dtype)


def ranks(importance: Sequence[float], shape: tuple[int, int], share: float) -> list[int]:
    """Return a rank per expert, in proportion to importance, such that all factors together hold `share` of the
    numbers of W.

    At least 1 and at most where the factors stop being smaller than the matrix, out·in / (out + in).
    """
    out, width = shape
    limit = out * width // (out + width)
    budget = max(len(importance), int(share * len(importance) * out * width / (out + width)))
    chosen = [1] * len(importance)
    left = min(budget, limit * len(importance)) - len(importance)
    # What an expert at the limit cannot use goes to the others, in proportion again.
    while left > 0:
        open_ = [i for i, rank in enumerate(chosen) if rank < limit and importance[i] > 0]
        if not open_:
            break  # the rest is never used: more of it would be stored for nothing
        total = sum(importance[i] for i in open_)
        wanted = {i: left * importance[i] / total for i in open_}
        given = {i: min(limit - chosen[i], int(wanted[i])) for i in open_}
        if not any(given.values()):
            given = dict.fromkeys(sorted(open_, key=lambda i: (-wanted[i], i))[:left], 1)
        for i, more in given.items():
            chosen[i] += more
        left -= sum(given.values())
    return chosen


def low_rank(
    model: nn.Module,
    sequences: npt.NDArray[Any],
    share: float,
    costs: Mapping[int, Sequence[float]] | None = None,
) -> tuple[dict[str, torch.Tensor], dict[int, list[int]]]:
    """Replace every expert's maps by their low-rank approximation, in place, so that any family's code runs them.

    costs: what ranks follow, by layer and expert; without them it is the gate-weighted size of outputs.
    Returns the factors, `layers.<l>.<map>.<expert>.a|b`, which are what has to be stored, and the ranks by layer.
    """
    factors: dict[str, torch.Tensor] = {}

    def look(tape: Tape) -> list[int]:
        own = tape.importance() if costs is None else costs[tape.layer.index]
        importance, chosen = [float(x) for x in own], list[int]()
        for name in (name for name in tape.layer.parameters if name in MAPS):
            bank = getattr(tape.layer.experts, name)
            chosen = ranks(importance, tuple(bank.shape[1:]), share)
            for expert, rank in enumerate(chosen):
                a, b = factorise(bank[expert], rank)
                bank[expert].copy_(a @ b)
                stem = f"layers.{tape.layer.index}.{name}.{expert}"
                factors.update({f"{stem}.a": a.cpu(), f"{stem}.b": b.cpu()})
        return chosen

    return factors, each_layer(model, sequences, look)
