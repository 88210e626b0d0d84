"""Weights of a composition learned from a few examples, without gradients (LoRAHub, Huang et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from connito.errors import Invalid

BOUND = 1.5
# How far the search looks at first.
STEP = 0.25
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
    names: Sequence[str], loss: Callable[[dict[str, float]], float], *, budget: int = 0, l1: float = L1
) -> LearnedWeights:
    """Return weights in ±1.5 that minimise `loss(weights)` + l1 · mean |w|; `loss` in nats per token on the examples.

    Starts from nothing, from each expert alone and from their mean, and improves on the best of them by COBYLA (Powell
    1994), which fits planes and so needs few evaluations with many experts; the objective is never worse than at any of
    the starts. At most `budget` evaluations beyond them, 0: eight an expert and at least 60. Deterministic.
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
    # COBYLA cannot work with fewer evaluations than it needs for its first plane.
    options = {"maxiter": max(budget or max(60, 8 * count), count + 2), "rhobeg": STEP, "tol": 1e-4}
    minimize(objective, best, method="COBYLA", bounds=[(-BOUND, BOUND)] * count, options=options)
    best = min((np.array(point) for point in [*seen]), key=objective)
    weights = dict(zip(names, (float(x) for x in np.clip(best, -BOUND, BOUND)), strict=True))
    return LearnedWeights(weights, measured(best), {name: measured(start) for name, start in starts.items()}, len(seen))
