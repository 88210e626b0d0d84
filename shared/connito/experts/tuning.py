"""Train what is left of a pruned model: its experts on text, and thinned experts beside those that they were.

Expert-wise distillation (MoE-Pruner, Xie et al. 2024, section 3.3): L = L_CE + λ Σ_l Σ_e MSE(E_t(x), E_s(x)), x what the
student's router sends to expert e of layer l, λ the quotient of both as they begin. Weights that were set to zero stay zero.

LoRA on low-rank experts (MoE-I², Yang et al. 2024, section 3.3): of W = A B each factor learns a change of low rank, so that
the product has the rank that it had.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from connito.errors import Invalid
from connito.experts.prune import WINDOWS, Keep, progressive
from connito.moe.adamw import AdamW
from connito.moe.batches import batch_of
from connito.moe.head import Head
from connito.moe.layout import MoELayer, require_moe_layers
from connito.moe.resident import compress
from connito.moe.rows import write_rows
from connito.moe.training import train_local

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

BATCH = 4
LEARNING_RATE = 1e-3
# Of LoRA: rank, and what the change is multiplied by.
RANK, SCALE = 8, 2.0


def batches_of(sequences: npt.NDArray[Any], steps: int) -> npt.NDArray[Any]:
    """Return [steps, B, L + 1] from `sequences` [n, L + 1], again from the start where they end."""
    size = min(BATCH, len(sequences))
    return np.stack([np.take(sequences, range(size * i, size * (i + 1)), axis=0, mode="wrap") for i in range(steps)])


def tune_experts(model: nn.Module, sequences: npt.NDArray[Any], steps: int, rate: float = LEARNING_RATE) -> None:
    """Train every expert of `model`, in place, for `steps` batches; routers and everything else are frozen."""
    places = {index: list(range(layer.num_experts)) for index, layer in require_moe_layers(model).items()}
    worker = compress(copy.deepcopy(model), places)
    state, _ = train_local(worker, batches_of(sequences, steps), learning_rate=rate)
    write_rows(model, places, state)


def tune_for_task(
    model: nn.Module, sequences: npt.NDArray[Any], text: npt.NDArray[Any], steps: int, rate: float = LEARNING_RATE
) -> tuple[Keep, list[tuple[int, float]]]:
    """Train experts for a task, in place, while all but one a layer go; returns what `progressive` does.

    One pass of fine-tuning on `text` [n, L + 1] (Task-Specific Expert Pruning, Chen et al. 2022): experts are counted on
    `sequences` and dropped window by window in its first half, and the one that is left trains alone in the other.
    """
    each = max(1, steps // 2 // WINDOWS)
    found = progressive(model, sequences, tune=lambda small: tune_experts(small, text, each, rate))
    tune_experts(model, text, max(1, steps - each * WINDOWS), rate)
    return found


def distil(
    model: nn.Module,
    teacher: nn.Module,
    sequences: npt.NDArray[Any],
    steps: int,
    *,
    rate: float = LEARNING_RATE,
) -> list[float]:
    """Train the experts of the thinned `model`, in place, towards those of `teacher`; returns the losses.

    sequences: int32 [n, L + 1]. Zeros of a bank stay zeros.
    """
    layers, masters = require_moe_layers(model), require_moe_layers(teacher)
    banks = [getattr(layer.experts, name) for layer in layers.values() for name in layer.parameters]
    if not all(torch.is_floating_point(bank) for bank in banks):
        raise Invalid("experts of whole numbers cannot be trained: load the model in F32 or BF16")
    masks = [bank.detach() != 0 for bank in banks]
    optimiser = AdamW({str(number): bank for number, bank in enumerate(banks)}, betas=(0.9, 0.95))
    head, losses, weight = Head(model), list[float](), 0.0
    for bank in banks:
        bank.requires_grad_(True)
    try:
        for batch in batches_of(sequences, steps):
            text, distance = _losses(head, layers, masters, batch)
            if not losses:
                both = float(text.detach()), float(distance.detach())
                weight = both[0] / both[1] if both[1] else 1.0
            loss = text + weight * distance
            loss.backward()  # type: ignore[no-untyped-call]
            for bank, mask in zip(banks, masks, strict=True):
                if bank.grad is not None:  # What never has a gradient, Adam leaves alone.
                    bank.grad.mul_(mask)
            optimiser.step(rate)
            losses.append(float(loss.detach()))
    finally:
        for bank in banks:
            bank.requires_grad_(False)
    return losses


def recover(
    model: nn.Module,
    factors: dict[str, torch.Tensor],
    sequences: npt.NDArray[Any],
    steps: int,
    *,
    rank: int = RANK,
    rate: float = LEARNING_RATE,
) -> list[float]:
    """Train the factors of `low_rank` on `sequences` int32 [n, L + 1] by LoRA, in place in both; returns the losses.

    A becomes A + s U V with U [out, r'] zero at first and V [r', r] drawn, B the same. Everything else is frozen.
    """
    layers, draw = require_moe_layers(model), torch.Generator().manual_seed(0)
    banks = {name: _bank(layers, name) for name in factors if name.endswith(".a")}
    start, changes = dict[str, torch.Tensor](), dict[str, tuple[torch.Tensor, torch.Tensor]]()
    for name, factor in factors.items():
        device = banks[f"{name[:-1]}a"][0].device
        start[name], changes[name] = factor.float().to(device), _change(factor, rank, draw, device)
    optimiser = AdamW(
        {f"{name}.{side}": part for name, pair in changes.items() for side, part in zip("uv", pair, strict=True)},
        betas=(0.9, 0.95),
    )
    head, losses = Head(model), []

    def product(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        a, b = (start[each] + SCALE * changes[each][0] @ changes[each][1] for each in (name, f"{name[:-1]}b"))
        return a.to(dtype) @ b.to(dtype)

    for bank, _ in banks.values():
        bank.requires_grad_(True)
    try:
        for batch in batches_of(sequences, steps):
            loss = head.nll(*batch_of(batch, model)).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
            for name, (bank, expert) in banks.items():
                if bank.grad is not None:
                    product(name).backward(bank.grad[expert].float())  # type: ignore[no-untyped-call]
            optimiser.step(rate)
            with torch.no_grad():
                for name, (bank, expert) in banks.items():
                    bank[expert].copy_(product(name, bank.dtype))
                    bank.grad = None
    finally:
        for bank, _ in banks.values():
            bank.requires_grad_(False)
    with torch.no_grad():
        for name, (u, v) in changes.items():
            factors[name] = (start[name] + SCALE * u @ v).to(factors[name])
    return losses


def _bank(layers: dict[int, MoELayer], name: str) -> tuple[torch.Tensor, int]:
    """Return the tensor of all experts that a factor `layers.<l>.<map>.<expert>.a` is of, and which expert."""
    _, index, parameter, expert, _ = name.split(".")
    return getattr(layers[int(index)].experts, parameter), int(expert)


def _change(
    factor: torch.Tensor, rank: int, draw: torch.Generator, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    out, width = factor.shape
    rank = min(rank, *factor.shape)
    v = (torch.rand(rank, width, generator=draw) * 2 - 1) / width**0.5
    return torch.zeros(out, rank, device=device).requires_grad_(True), v.to(device).requires_grad_(True)


def _losses(
    head: Head, layers: dict[int, MoELayer], masters: dict[int, MoELayer], batch: npt.NDArray[Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross-entropy and the distance of the experts, both []."""
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    with ExitStack() as stack:
        for index, layer in layers.items():

            def look(_: nn.Module, args: tuple[Any, ...], index: int = index) -> None:
                seen[index] = args[0].detach().reshape(-1, args[0].shape[-1]), args[1].reshape(-1, args[1].shape[-1])

            stack.callback(layer.experts.register_forward_pre_hook(look).remove)
        loss = head.nll(*batch_of(batch, head.model)).mean()
    distances = [expert_error(layers[index], masters[index], *seen[index]).to(loss) for index in layers]
    return loss, torch.stack(distances).sum()


def expert_error(layer: MoELayer, master: MoELayer, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return Σ_e MSE(E_t(x), E_s(x)) over the tokens x [T, H] that `ids` [T, k] send to each expert."""
    total = x.new_zeros(())
    for expert in range(layer.num_experts):
        own = x[(ids == expert).any(dim=-1)]
        if len(own):
            slot, one = own.new_full((len(own), 1), expert, dtype=torch.long), own.new_ones(len(own), 1)
            with torch.no_grad():
                wanted: torch.Tensor = master.experts.forward(own, slot, one)
            total = total + (layer.experts.forward(own, slot, one) - wanted).square().mean()
    return total
