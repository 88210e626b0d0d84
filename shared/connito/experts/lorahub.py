"""Weights of a composition learned from a few examples, without gradients (LoRAHub, Huang et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from connito.errors import Invalid

BOUND = 1.5
# The published 0.05 weighs against losses of whole tasks; library experts save hundredths of a nat per token.
L1 = 0.001


@dataclass(frozen=True)
class LearnedWeights:
    """`weights` by expert; `loss` with them and `losses` of the starting points (`base`, each expert alone, `mean`)."""

    weights: dict[str, float]
    loss: float
    losses: dict[str, float]
    evaluations: int


def learn_weights(
    names: Sequence[str], loss: Callable[[dict[str, float]], float], *, budget: int = 60, l1: float = L1
) -> LearnedWeights:
    """Return weights in ±1.5 that minimise `loss(weights)` + l1 · mean |w|; `loss` in nats per token on the examples.

    Starts from nothing, from each expert alone and from their mean, and improves on the best of them by Nelder–Mead, so
    the objective is never worse than any of those. At most `budget` evaluations beyond the starts. Deterministic.
    """
    from scipy.optimize import minimize

    if not names:
        raise Invalid("there are no experts to weigh")
    seen: dict[tuple[float, ...], float] = {}

    def measured(point: Any) -> float:
        key = tuple(float(x) for x in np.clip(point, -BOUND, BOUND))
        if key not in seen:
            seen[key] = float(loss(dict(zip(names, key, strict=True))))
        return seen[key]

    def objective(point: Any) -> float:
        return measured(point) + l1 * float(np.abs(np.clip(point, -BOUND, BOUND)).mean())

    count = len(names)
    starts = {"base": np.zeros(count), "mean": np.full(count, 1 / count)}
    starts |= {name: np.eye(count)[i] for i, name in enumerate(names)}
    best = min(starts.values(), key=objective)
    if budget:
        simplex = np.vstack([best, *(np.clip(best + 0.25 * np.eye(count)[i], -BOUND, BOUND) for i in range(count))])
        options = {"maxfev": budget, "initial_simplex": simplex, "xatol": 1e-3, "fatol": 1e-6}
        found = minimize(objective, best, method="Nelder-Mead", bounds=[(-BOUND, BOUND)] * count, options=options).x
        best = min((best, found), key=objective)
    weights = dict(zip(names, (float(x) for x in np.clip(best, -BOUND, BOUND)), strict=True))
    return LearnedWeights(weights, measured(best), {name: measured(start) for name, start in starts.items()}, len(seen))
