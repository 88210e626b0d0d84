"""Prediction of the loss that library experts save on a few texts, by one backward pass; the best are then measured.

To first order, putting in an expert with δ = θ − θ_base changes the loss by ⟨∇L(θ_base), δ⟩. The gradient of the rows
that any candidate touches is computed once; a prediction is then one inner product per expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from connito.data.packing import counted
from connito.errors import Invalid
from connito.experts.compose import Part, Rows, base_rows, layers_of, state_of
from connito.library.index import saving
from connito.library.signature import Vectors, decode_signature, nearest
from connito.moe.batches import batch_of
from connito.moe.evaluate import Evaluator
from connito.moe.head import Head
from connito.moe.layout import require_moe_layers
from connito.moe.statistics import collect

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn


def row_gradients(model: nn.Module, layers: Mapping[int, Sequence[int]], sequences: npt.NDArray[Any]) -> Rows:
    """Return ∂(mean nats per token)/∂θ of the rows of `layers`, float32, on the CPU, for sequences [n, L + 1]."""
    if not len(sequences):
        raise Invalid("the example texts are too short: give at least a few hundred words")
    found = require_moe_layers(model)
    banks = {(layer, name): getattr(found[layer].experts, name) for layer in layers for name in found[layer].parameters}
    head, tokens = Head(model), int(counted(sequences).sum())
    wanted = [(bank, bank.requires_grad) for bank in banks.values()]
    for bank, _ in wanted:
        bank.requires_grad_(True)
    try:
        total = [torch.zeros_like(bank) for bank, _ in wanted]
        for row in sequences:
            loss = head.nll(*batch_of(row[None], model)).sum() / tokens
            parts = torch.autograd.grad(loss, [bank for bank, _ in wanted])
            total = [so_far + part for so_far, part in zip(total, parts, strict=True)]
    finally:
        for bank, before in wanted:
            bank.requires_grad_(before)
    gradients = dict(zip(banks, total, strict=True))
    return {
        (layer, expert, name): gradients[layer, name][expert].float().cpu()
        for layer, name in banks
        for expert in layers[layer]
    }


def predict_savings(model: nn.Module, parts: Sequence[Part], sequences: npt.NDArray[Any]) -> dict[str, float]:
    """Return nats per token that each part would save on `sequences`, to first order: −⟨∇L, δ⟩. `model` is the bare
    base.
    """
    if not parts:
        return {}
    base = base_rows(model, parts)
    gradients = row_gradients(model, layers_of(base), sequences)
    return {
        part.name: -sum(
            float((gradients[key] * (row.float() - base[key].float())).sum()) for key, row in part.rows.items()
        )
        for part in parts
    }


def measure_savings(model: nn.Module, parts: Iterable[Part], sequences: npt.NDArray[Any]) -> dict[str, float]:
    """Return nats per token that each part saves on `sequences`, on the full model, which is left as it was."""
    saved = {}
    for part in parts:
        evaluator = Evaluator(model, layers_of(part.rows))
        before, tokens = evaluator.losses(None, sequences)
        try:
            after, _ = evaluator.losses(state_of(part.rows), sequences)
        finally:
            evaluator.restore()
        saved[part.name] = float((before.sum() - after.sum()) / tokens.sum())
    return saved


def text_vectors(model: nn.Module, sequences: npt.NDArray[Any]) -> Vectors:
    """Return the mean hidden state at each layer's router on `sequences` int32 [n, L + 1]: what signatures are
    compared with.
    """
    served: dict[int, Any] = {}
    statistics = collect(model, sequences[:, :-1], served=served)
    return {i: [float(x) for x in sums.sum(axis=0) / statistics.layers[i].counts.sum()] for i, sums in served.items()}


def nearest_experts(
    model: nn.Module, records: Mapping[str, Mapping[str, Any]], sequences: npt.NDArray[Any]
) -> list[str]:
    """Return expert ids by how near their routing signatures are to the texts', nearest first. No expert file is read.

    Of equally near ones, those that saved most on their own domain come first. Those without a signature come last.
    """
    signed = {name: decode_signature(r["signature"]) for name, r in records.items() if r.get("signature")}
    saved = {name: saving(record) or 0.0 for name, record in records.items()}
    near = nearest(text_vectors(model, sequences), signed)
    ordered = sorted(near, key=lambda item: (-round(item[1], 6), -saved[item[0]], item[0]))
    return [name for name, _ in ordered] + sorted(records.keys() - signed.keys(), key=lambda name: (-saved[name], name))
