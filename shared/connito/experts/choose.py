"""Choice of the experts that stay when a model is made smaller.

naee             per layer, the subset whose layer output is closest to the full layer's on calibration text: every
                 subset where there are few, else one expert dropped at a time (NAEE, Lu et al. 2024, eq. 2)
router-weighted  experts by Σ_t g_e(x_t)·‖E_e(x_t)‖, over all layers at once (the score of MoE-Pruner, Xie et al. 2024,
                 taken for whole experts)
moe-i2           places are dealt to layers by how much losing an expert there costs; within a layer a genetic search,
                 over neighbouring layers the best combination (MoE-I², Yang et al. 2024, section 3.1)

Shapes: T calibration tokens, H hidden size, N experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from connito.errors import Invalid
from connito.experts.genetic import fittest, receptive
from connito.experts.measure import loss
from connito.experts.prune import Keep, masked
from connito.experts.removal import check_prunable
from connito.experts.tape import Tape, each_layer
from connito.moe.layout import MoELayer, require_moe_layers
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import nn

METHODS = ("naee", "router-weighted", "moe-i2")
# As many subsets of a layer's experts are tried one by one; beyond, experts are dropped greedily.
EXACT_SUBSETS = 3000


def choose(
    model: nn.Module,
    sequences: npt.NDArray[Any],
    method: str = "naee",
    *,
    max_experts: int = 0,
    max_bytes: int = 0,
    max_tokens: int = 2048,
    even: bool = False,
) -> Keep:
    """Return the experts to keep when at most `max_experts` (over all layers), or `max_bytes` of expert tensors, may
    stay.

    sequences: calibration text int32 [n, L + 1]. naee keeps equally many in every layer, the others as many as each
    layer earns, at least one; with `even` all do, since a checkpoint has one number for all its layers. Raises `Invalid`
    (BAD_SPEC) for a budget below one expert a layer.
    """
    layers = require_moe_layers(model)
    budget = _budget(layers, max_experts, max_bytes)
    if method not in METHODS:
        raise Invalid(f"unknown pruning method {method!r}: use {', '.join(METHODS)}")
    totals = {index: layer.num_experts for index, layer in layers.items()}
    text = sequences[:, :-1]
    counts = {index: max(1, min(budget // len(layers), total)) for index, total in totals.items()}
    if method == "router-weighted":
        scores = each_layer(model, text, Tape.importance, max_tokens=max_tokens, check=check_prunable)
        return {index: _largest(scores[index], counts[index]) for index in scores} if even else _best(scores, budget)
    if method == "moe-i2" and even:
        return _searched(model, text, counts, max_tokens)
    if method == "moe-i2":
        costs = {index: float(np.mean(rises)) for index, rises in expert_costs(model, sequences).items()}
        return _searched(model, text, deal(costs, totals, budget), max_tokens)
    return each_layer(
        model, text, lambda tape: naee(tape, counts[tape.layer.index]), max_tokens=max_tokens, check=check_prunable
    )


def _searched(model: nn.Module, text: npt.NDArray[Any], counts: Mapping[int, int], max_tokens: int) -> Keep:
    def look(tape: Tape) -> list[tuple[int, ...]]:
        return fittest(tape.layer.num_experts, counts[tape.layer.index], tape.error, seed=tape.layer.index)

    found = each_layer(model, text, look, max_tokens=max_tokens, check=check_prunable)
    return receptive(model, text[: max(1, max_tokens // max(1, text.shape[1]))], found)


def _budget(layers: Mapping[int, MoELayer], max_experts: int, max_bytes: int) -> int:
    """Return the number of experts that may stay. All layers' experts have one size in every family known here."""
    total = sum(layer.num_experts for layer in layers.values())
    budget = min(max_experts or total, total)
    if max_bytes:
        size = max(expert_bytes(layer) for layer in layers.values())
        budget = min(budget, max_bytes // size)
    if budget < len(layers):
        raise Invalid(
            f"the budget admits {budget} experts, but {len(layers)} layers need one each: raise --max-experts or --max-bytes",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    return budget


def expert_bytes(layer: MoELayer) -> int:
    """Return the size of one expert of the layer."""
    rows = [getattr(layer.experts, name)[0] for name in layer.parameters]
    return sum(row.numel() * row.element_size() for row in rows)


def naee(tape: Tape, count: int) -> list[int]:
    """Return the `count` experts whose layer output is closest to the full layer's."""
    total = tape.layer.num_experts
    if comb(total, count) <= EXACT_SUBSETS:
        return list(min(combinations(range(total), count), key=lambda keep: (tape.error(list(keep)), keep)))
    keep = list(range(total))
    while len(keep) > count:
        drop = min(keep, key=lambda e: (tape.error([x for x in keep if x != e]), e))
        keep.remove(drop)
    return keep


def _largest(scores: npt.NDArray[np.float64], count: int) -> list[int]:
    return sorted(int(expert) for expert in np.argsort(-scores, kind="stable")[:count])


def _best(importance: Mapping[int, npt.NDArray[np.float64]], budget: int) -> Keep:
    """Keep the best expert of each layer, then the best of all layers; a layer's importances are shares of its own
    sum.
    """
    shares = {index: scores / max(scores.sum(), 1e-300) for index, scores in importance.items()}
    keep = {index: [int(np.argmax(score))] for index, score in shares.items()}
    rest = sorted(
        (-float(score[e]), index, e)
        for index, score in shares.items()
        for e in range(len(score))
        if e not in keep[index]
    )
    for _, index, expert in rest[: budget - len(keep)]:
        keep[index].append(expert)
    return {index: sorted(experts) for index, experts in keep.items()}


def expert_costs(model: nn.Module, sequences: npt.NDArray[Any]) -> dict[int, list[float]]:
    """Return the rise of the loss when an expert is left out, never below zero, by layer and expert."""
    layers, whole = require_moe_layers(model), loss(model, sequences)
    costs = {}
    for index, layer in layers.items():
        rises = []
        for expert in range(layer.num_experts if layer.num_experts > 1 else 0):
            with masked(model, {index: [e for e in range(layer.num_experts) if e != expert]}):
                rises.append(max(0.0, loss(model, sequences) - whole))
        costs[index] = rises or [0.0]
    return costs


def deal(costs: Mapping[int, float], totals: Mapping[int, int], budget: int) -> dict[int, int]:
    """Return `budget` places in proportion to `costs`, at least 1 and at most `totals[l]` a layer; every place is given."""
    counts = dict.fromkeys(sorted(costs), 1)
    scale = sum(costs.values()) or 1.0
    wanted = {
        index: budget * (cost / scale if sum(costs.values()) else 1 / len(costs)) for index, cost in costs.items()
    }
    for _ in range(min(budget, sum(totals.values())) - len(counts)):
        open_ = [index for index in counts if counts[index] < totals[index]]
        counts[max(open_, key=lambda index: (wanted[index] - counts[index], -index))] += 1
    return counts
