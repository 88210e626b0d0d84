"""The part of a submission that is its own: what earlier ones do not explain, against what is usual between them.

Miners that train on the same domain share the signal of their pseudo-gradients; the noise of their own training they do
not. A submission is written as a combination of all earlier ones, Σ a_k x_k + e. Honest work leans on all of them, a
little on each, as they do on one another; what was made from somebody's work leans on that one alone, and noise, however
long, changes the length of e and not the coefficients. Two signs follow, each a ratio to the least that any earlier one
shows in the same comparison with the rest, so that a cycle in which everybody learns the same convicts nobody:

span   ‖e‖², the part that lies outside the span of earlier work.
lean   1 − the share of the largest g coefficients in their sum: what is left to everybody else.

A third says how much of a work is its own where it leans on one and has steps of its own too:

own    what nobody explains, over what the others leave of the one that is leant on, less the correlation that the two have
       beside everybody else. Honest work shares with another what both share with the rest, and its noise with nobody.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

# Keeps the inverse defined where works are collinear; far below what honest works differ by.
RIDGE = 1e-6
# With fewer earlier works there is nothing usual to compare with.
FOR_SPAN, FOR_LEAN = 2, 3
# Where earlier works lean on one another so exclusively, leaning is no sign.
LEAST_REST = 0.05
# A work that the others explain less than this of (R²) is alone in its domain, and shows nothing of how others lean.
EXPLAINED = 0.2
# A library's last digits must not decide.
_DIGITS = 9


@dataclass(frozen=True)
class Novelty:
    """Ratios of a submission to the least novel other one (infinite where there is no comparison), whom it leans on most, as a
    place among the others, `own`, and the part that the others leave at least of any of them.
    """

    span: float
    lean: float
    victim: int
    own: float = float("inf")
    usual: float = 1.0


def novelty(similarity: Matrix, earlier: Sequence[int], later: int, victims: int | None = None) -> Novelty:
    """Compare one work with earlier ones; `similarity` [n, n] has cosines of all. One that is like nothing is novel.

    `victims`: only so many of `earlier`, the first, can be leant on; the rest show what is usual. None: all of them.
    """
    rows, count = list(earlier), len(earlier)
    among = similarity[np.ix_(rows, rows)] + RIDGE * np.eye(count)
    inverse: Matrix = np.asarray(np.linalg.inv(among), np.float64)
    parts = inverse @ similarity[rows, later]
    rest = max(0.0, 1.0 - float(similarity[rows, later] @ parts))
    span = lean = float("inf")
    if count >= FOR_SPAN:
        span = round(rest * float(np.diag(inverse).max()), _DIGITS)
    if count >= FOR_LEAN:
        lean = round(_lean(parts, inverse, count if victims is None else victims), _DIGITS)
    victim, outside = int(np.argmax(np.round(parts[:victims], _DIGITS))), 1.0 / np.diag(inverse)
    return Novelty(span, lean, victim, _own(rest, float(parts[victim]), float(outside[victim])), float(outside.min()))


def _own(rest: float, part: float, outside: float) -> float:
    """Return `own` by the coefficient of the one leant on and what others leave of it; infinite for one alone in its domain."""
    if 1.0 - outside < EXPLAINED:
        return float("inf")
    alike = part * np.sqrt(outside / max(RIDGE, rest + part * part * outside))
    return round(float(rest / outside - alike), _DIGITS)


def _lean(parts: Matrix, inverse: Matrix, victims: int) -> float:
    """Return the smallest ratio over group sizes g = 1 … (n − 1) / 2 of what the group leaves to the rest."""
    count, outside = len(parts), 1.0 / np.diag(inverse)
    known = np.flatnonzero(1.0 - outside >= EXPLAINED)
    order = np.argsort(-np.abs(parts), kind="stable")
    if len(known) < FOR_LEAN or order[0] not in known:
        return float("inf")
    # Coefficients of each earlier work on all others, from the inverse alone. In the midst of all, those that lean on the
    # same one as this does are no measure of what is usual: several thieves of one victim would vouch for each other.
    mutual = -inverse * outside[:, None]
    np.fill_diagonal(mutual, 0.0)
    midst = victims < count
    apart = [place for place in known if not midst or int(np.abs(mutual[place]).argmax()) != order[0]]
    if len(apart) < FOR_SPAN:
        return float("inf")
    usual = np.stack([_left(mutual[place]) for place in apart]).min(axis=0)
    mine, may = _left(parts), set(known[known < victims].tolist())
    asked = [
        size for size in range((count - 1) // 2) if usual[size] >= LEAST_REST and set(order[: size + 1].tolist()) <= may
    ]
    return min((float(mine[size] / usual[size]) for size in asked), default=float("inf"))


def _left(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return by g the share, in absolute size, of coefficients beside the g largest."""
    ordered = -np.sort(-np.abs(parts))
    total = float(ordered.sum())
    return 1.0 - np.cumsum(ordered) / total if total > 0.0 else np.ones_like(ordered)
