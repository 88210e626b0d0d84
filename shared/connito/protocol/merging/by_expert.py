"""Shares of a merge expert by expert: what a submission says of an expert counts by the tokens that its miner routed there.

With shares of whole submissions an expert that the text of one miner uses is divided by all miners, and the others add
noise to it: AdamW moves a row by about its learning rate however small the gradient was. So

    w[i, e] = n[i, e] · v[i] / Σ_j n[j, e] · v[j]

with n the tokens that miner i routed to expert e, and v its utility where the aggregator counts utilities, over one plus
its staleness. A robust aggregator judges each expert among the miners that used it. An expert that nobody used keeps its
rows and its outer momentum to the bit.

A merge takes of a submission the experts that its miner's text used, so that is what is judged, too: not θ_i, but

    θ_t − ½ · a[i, e] · δ[i, e],   a[i, e] = min(1, p[i, e] / q[e])

with p the miner's tokens and q those of the target's probe, each as shares of a layer's selected experts. As a whole, the rows
that a specialist's text hardly touched are noise that hides what its own experts have learned. Half, as that is the most that a
merge with one other takes of it: many local steps go too far on their own, and are right in the mean. So that no expert goes
into a merge more strongly than a says, Δ of one that those who are merged used less than the target does is shortened to
`mass`[e] = min(1, Σ p / q): with the plain mean, w[i, e] · mass[e] ≤ a[i, e] for everybody.

Shapes: n submissions, S selected experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connito.errors import Invalid
from connito.protocol.claims import Claim, counts_of
from connito.v1 import reasons_pb2 as reasons
from connito.v1.run_pb2 import SelectionMade

Floats = NDArray[np.float64]
# Tokens by layer, [n, S].
Routed = Mapping[int, Floats]
# What the target's probe uses of a layer's selected experts, [S], in any unit; empty where the selection does not say it.
Use = Mapping[int, Floats]
# Inner products by layer, [S, n, n].
Grams = Mapping[int, Floats]
# Of what a merge of one submission alone would take, the part that is judged.
JUDGED = 0.5
# (utilities, staleness, even weights, inner products of those who take part) -> (weights, factors) of them
Weighing = Callable[[Sequence[float], Sequence[int], list[float], Floats], tuple[list[float], list[float]]]


@dataclass(frozen=True)
class Shares:
    """Weights and factors of a layer, both [n, S], and the length of each expert's merged step, [S], from 0 to 1.

    A column of weights sums to 1, or is zero where nobody used the expert.
    """

    weights: Floats
    factors: Floats
    mass: Floats

    @property
    def used(self) -> NDArray[np.bool_]:
        """Return which experts somebody used, [S]."""
        return np.asarray((self.weights > 0).any(axis=0))


def shares(
    weigh: Weighing, utilities: Sequence[float], staleness: Sequence[int], routed: Routed, grams: Grams | None, use: Use
) -> dict[int, Shares]:
    """Return the shares by layer. `grams` may be absent where the aggregator looks at no inner products.

    Raises `Invalid` (BAD_SPEC) when nobody used any of the experts.
    """
    found = {}
    for layer, counts in sorted(routed.items()):
        weights, factors = np.zeros(counts.shape), np.ones(counts.shape)
        for expert in range(counts.shape[1]):
            users = [i for i in range(len(counts)) if counts[i, expert] > 0 and utilities[i] > 0.0]
            if not users:
                continue
            tokens = [float(counts[i, expert]) for i in users]
            even = _normal([tokens[at] / (1 + staleness[i]) for at, i in enumerate(users)])
            worth = [tokens[at] * utilities[i] for at, i in enumerate(users)]
            gram = np.eye(len(users)) if grams is None else grams[layer][expert][np.ix_(users, users)]
            weights[users, expert], factors[users, expert] = weigh(worth, [staleness[i] for i in users], even, gram)
        ages = 1.0 + np.asarray(staleness, float)
        together = (counts / ages[:, None]).sum(axis=0, keepdims=True)
        found[layer] = Shares(weights, factors, strengths({layer: together}, use)[layer][0])
    if not any(of.used.any() for of in found.values()):
        raise Invalid("there is nothing to merge: no expert was used", reason=reasons.REASON_BAD_SPEC)
    return found


def strengths(routed: Routed, use: Use) -> dict[int, Floats]:
    """Return a by layer, [n, S]: how far each row of counts uses experts as the target does. Ones without `use`."""
    found = {}
    for layer, counts in routed.items():
        if layer not in use:
            found[layer] = np.ones(counts.shape)
            continue
        # p / q without a quotient that could be 0 / 0: an expert that neither uses is not judged.
        mine = counts * float(use[layer].sum())
        target = counts.sum(axis=1, keepdims=True) * use[layer]
        found[layer] = np.divide(np.minimum(mine, target), target, out=(mine > 0).astype(float), where=target > 0)
    return found


def use_of(selection: SelectionMade) -> dict[int, Floats]:
    """Return what the target's probe uses of the selected experts, [S] by layer; nothing where the selection does not say it."""
    said = all(len(layer.use) == len(layer.experts) for layer in selection.layers)
    return {layer.layer: np.asarray(layer.use, float) for layer in selection.layers} if said else {}


def judged(claims: Sequence[Claim | None], use: Use) -> dict[int, Floats]:
    """Return how much of each expert of each submission is judged, [n, S] by layer; all of who makes no claim. Empty: of all."""
    if not use:
        return {}
    silent = np.array([claim is None for claim in claims])[:, None]
    return {layer: np.where(silent, 1.0, JUDGED * rows) for layer, rows in strengths(counts_of(claims), use).items()}


def alone(strength: Mapping[int, Floats]) -> dict[int, Shares]:
    """Return the shares of one submission that is stepped to as it was judged: `strength` is its row [S] by layer."""
    ones = {layer: np.ones((1, len(row))) for layer, row in strength.items()}
    return {layer: Shares(ones[layer], ones[layer], row) for layer, row in strength.items()}


def _normal(values: Sequence[float]) -> list[float]:
    total = math.fsum(values)
    return [value / total for value in values]


def of_submissions(found: Mapping[int, Shares]) -> tuple[float, ...]:
    """Return each submission's share of the whole merge: the mean over the experts that somebody used."""
    columns = np.concatenate([of.weights[:, of.used] for _, of in sorted(found.items())], axis=1)
    return tuple(math.fsum(row) / columns.shape[1] for row in columns.tolist())


def of_equal_mass(routed: Routed) -> dict[int, Floats]:
    """Return counts of which each miner's have the same sum in a layer, the median of all: who cannot be checked may say
    where its tokens went, and not how many there were.
    """
    found = {}
    for layer, counts in routed.items():
        sums = counts.sum(axis=1, dtype=np.float64)
        median = float(np.median(sums[sums > 0])) if (sums > 0).any() else 0.0
        found[layer] = counts * np.divide(median, sums, out=np.zeros_like(sums), where=sums > 0)[:, None]
    return found


def along(column: Floats, rows: NDArray[np.float32] | Floats) -> Floats:
    """Return a value per expert, [S], so that it multiplies rows [S, …]."""
    return column.reshape(-1, *([1] * (rows.ndim - 1)))


def middle(values: NDArray[np.float32], weights: Floats, trim: float) -> Floats:
    """Return the mean of the middle of weighted values, number by number: [n, S, …] and [n, S] -> [S, …].

    Of the weight, `trim` is dropped at either end, at least the largest single one; where that leaves nothing, the weighted
    median is meant. An expert without weight comes out as zero.
    """
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0).astype(np.float64)
    spread = np.broadcast_to(np.stack([along(row, values[0]) for row in weights]), values.shape)
    mass = np.take_along_axis(spread, order, axis=0)
    upper = np.cumsum(mass, axis=0)
    dropped = along(np.minimum(np.maximum(trim, weights.max(axis=0)), 0.5), values[0])
    inside = np.maximum(np.minimum(upper, 1.0 - dropped) - np.maximum(upper - mass, dropped), 0.0)
    at_half = ((upper >= 0.5 - _ROUNDING) & (upper - mass <= 0.5 + _ROUNDING) & (mass > 0)).astype(np.float64)
    kept = np.where(dropped >= 0.5 - _ROUNDING, at_half, inside)
    total, norm = np.zeros(values.shape[1:]), np.zeros(values.shape[1:])
    for row, part in zip(ordered, kept, strict=True):
        total, norm = total + row * part, norm + part
    return np.divide(total, norm, out=np.zeros_like(total), where=norm > 0)


# Of cumulated weights: what half of them is must not hang on the last bit.
_ROUNDING = 1e-9
