"""Paired intervals of a change in loss, without numeric packages: the library's image has none.

The same arithmetic as `connito.protocol.scoring.proof_of_loss.paired`; Student's quantile comes from its distribution
function by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE = 0.95


def change_interval(
    before: Sequence[float], after: Sequence[float], tokens: Sequence[int], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Return (low, high) of the change after - before in nats per token, from sums [n] and token counts [n] of one set
    of sequences; None for fewer than two sequences, for lengths that differ, and for losses that are not numbers.
    """
    n, total = len(tokens), sum(tokens)
    if n < 2 or len(before) != n or len(after) != n or total <= 0 or not all(map(math.isfinite, (*before, *after))):
        return None
    changes = [new - old for old, new in zip(before, after, strict=True)]
    mean = math.fsum(changes) / total
    residuals = math.fsum((change - mean * count) ** 2 for change, count in zip(changes, tokens, strict=True))
    half = t_quantile(0.5 + confidence / 2, n - 1) * math.sqrt(residuals * n / (n - 1)) / total
    return mean - half, mean + half


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's distribution at `probability`, which lies in [0.5, 1)."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < probability:
        high *= 2.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_cdf(value: float, freedom: int) -> float:
    """Return Student's distribution function for `value` >= 0: the finite sums for whole degrees of freedom
    (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    angle = math.atan(value / math.sqrt(freedom))
    cosine = math.cos(angle)
    term, total = (1.0, 1.0) if freedom % 2 == 0 else (cosine, cosine if freedom > 1 else 0.0)
    first = 1 if freedom % 2 == 0 else 2
    for k in range(first, freedom - 2, 2):
        term *= k / (k + 1) * cosine * cosine
        total += term
    even = math.sin(angle) * total
    return 0.5 + (even if freedom % 2 == 0 else 2 / math.pi * (angle + even)) / 2
