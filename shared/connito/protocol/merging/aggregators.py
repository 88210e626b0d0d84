"""Aggregating pseudo-gradients and taking the outer step.

Every aggregator but two is a weighted sum Δ = Σ c_i δ_i whose coefficients follow from inner products between the
submissions (their Gram matrix), so one pass over the tensors measures and a second one merges. The coordinate-wise two
look at every number by itself.

What is published must be recomputable bit for bit: arrays are combined in the order of the submissions given (sort them
by miner), one element-wise operation at a time in float64, rounded once at the end. Only element-wise operations touch
the weights, so no library's order of summation shows in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from connito.data.codecs.file import Codec, head
from connito.data.pseudo_gradients import CHUNK, Deltas, load_float32
from connito.data.tensors import Array, Layout, TensorWriter, from_float32, read_header, to_float32
from connito.errors import Invalid
from connito.protocol.coding import code_step
from connito.protocol.merging.by_expert import Grams, Routed, Shares, Use, along, middle, of_submissions, shares
from connito.protocol.policy.choices import AGGREGATORS
from connito.runtime.compute import usable_cores
from connito.v1 import reasons_pb2 as reasons

Gram = NDArray[np.float64]

# Share of submissions that trimmed-mean drops at either end of every coordinate.
TRIM = 0.2
COORDINATE_WISE = ("coordinate-median", "trimmed-mean")
# To whom a utility says more than that somebody takes part.
COUNT_UTILITIES = frozenset({"top-1", "utility-mean", "krum", "multi-krum"})
_WEISZFELD_ROUNDS = 200


@dataclass(frozen=True)
class Plan:
    """A plan of a merge. `weights` are the shares of the merge, non-negative and summing to 1; `factors` scale single δ_i
    (clipping). For coordinate-wise kinds the weights say who takes part. `experts`: both expert by expert, by layer, where a
    run merges so."""

    kind: str
    weights: tuple[float, ...]
    factors: tuple[float, ...]
    experts: Mapping[int, Shares] = field(default_factory=dict)

    def shares_of(self, name: str) -> Shares | None:
        """Return the shares by expert of a tensor `layers.<l>.<parameter>`; None where whole submissions have one each."""
        return self.experts[layer_of(name)] if self.experts else None


def layer_of(name: str) -> int:
    """Return the layer of a state's tensor, which is named `layers.<l>.<parameter>`."""
    return int(name.split(".")[1])


def staleness_weights(raw: Sequence[float], staleness: Sequence[int]) -> list[float]:
    """Divide weights by 1 + staleness (cycles between the work and the merge) and normalise to sum 1."""
    scaled = [value / (1 + age) for value, age in zip(raw, staleness, strict=True)]
    total = math.fsum(scaled)
    if not total > 0.0:
        raise Invalid("there is nothing to merge: every weight is zero", reason=reasons.REASON_BAD_SPEC)
    return [value / total for value in scaled]


def plan(aggregator: str, utilities: Sequence[float], staleness: Sequence[int], gram: Gram) -> Plan:
    """Return weights and factors for submissions 0..n-1, from agreed utilities, staleness in cycles and inner products
    [n, n].

    Raises `Invalid` (BAD_SPEC) for an unknown aggregator or without submissions.
    """
    _check(aggregator)
    if not utilities or len(utilities) != len(staleness) or gram.shape != (len(utilities),) * 2:
        raise Invalid("there is nothing to merge, or utilities, staleness and inner products differ in number")
    even = staleness_weights([1.0] * len(utilities), staleness)
    weights, factors = _WEIGHINGS[aggregator](utilities, staleness, even, gram)
    return Plan(aggregator, tuple(weights), tuple(factors))


def plan_by_expert(
    aggregator: str,
    utilities: Sequence[float],
    staleness: Sequence[int],
    routed: Routed,
    grams: Grams | None = None,
    use: Use = MappingProxyType({}),
) -> Plan:
    """Return the plan of a merge expert by expert (`connito.protocol.merging.by_expert`).

    grams: inner products by layer and expert, where `needs_grams`. use: that of the target's probe. Raises `Invalid` (BAD_SPEC)
    like `plan`.
    """
    _check(aggregator)
    found = shares(_WEIGHINGS[aggregator], utilities, staleness, routed, grams, use)
    weights = of_submissions(found)
    return Plan(aggregator, weights, tuple(1.0 for _ in weights), found)


def needs_grams(aggregator: str) -> bool:
    """Return whether an aggregator looks at inner products."""
    return aggregator in {"krum", "multi-krum", "geometric-median", "norm-clipped-mean"}


def _check(aggregator: str) -> None:
    if aggregator not in AGGREGATORS:
        raise Invalid(
            f"no aggregator is called {aggregator!r}; there are {', '.join(AGGREGATORS)}",
            reason=reasons.REASON_BAD_SPEC,
        )


_Weighing = tuple[list[float], list[float]]


def _mean(utilities: Sequence[float], staleness: Sequence[int], even: list[float], gram: Gram) -> _Weighing:
    return even, [1.0] * len(even)


def _utility_mean(utilities: Sequence[float], staleness: Sequence[int], even: list[float], gram: Gram) -> _Weighing:
    return staleness_weights(utilities, staleness), [1.0] * len(even)


def _top_1(utilities: Sequence[float], staleness: Sequence[int], even: list[float], gram: Gram) -> _Weighing:
    best = max(range(len(even)), key=lambda i: (utilities[i], -staleness[i], -i))
    return _only({best: 1.0}, len(even))


def _only(kept: dict[int, float], count: int) -> _Weighing:
    total = math.fsum(kept.values())
    return [kept.get(i, 0.0) / total for i in range(count)], [1.0] * count


def _krum_order(gram: Gram) -> tuple[list[int], int]:
    """Return indices by Krum score, best first, and f, the number of faulty ones assumed: the most that n ≥ 2f + 3
    admits.

    The score of i is the sum of squared distances to its n − f − 2 nearest (Blanchard et al., "Machine Learning with
    Adversaries", 2017).
    """
    count = len(gram)
    faulty = max(0, (count - 3) // 2)
    near = max(1, count - faulty - 2)
    squared = np.diag(gram)[:, None] + np.diag(gram)[None, :] - 2 * gram
    scores = []
    for i in range(count):
        distances = sorted(max(0.0, float(squared[i, j])) for j in range(count) if j != i)
        scores.append(math.fsum(distances[:near]))
    return sorted(range(count), key=lambda i: (scores[i], i)), faulty


def _krum(utilities: Sequence[float], staleness: Sequence[int], even: list[float], gram: Gram) -> _Weighing:
    # Two submissions are equally far from each other: distances decide nothing, utilities do.
    if len(even) <= 2:
        return _top_1(utilities, staleness, even, gram)
    return _only({_krum_order(gram)[0][0]: 1.0}, len(even))


def _multi_krum(utilities: Sequence[float], staleness: Sequence[int], even: list[float], gram: Gram) -> _Weighing:
    if len(even) <= 2:
        return even, [1.0] * len(even)
    order, faulty = _krum_order(gram)
    # The last one is always left out: with f = 0 multi-Krum would otherwise be the mean.
    kept = order[: len(even) - max(faulty, 1)]
    return _only({i: even[i] for i in kept}, len(even))


def _geometric_median(utilities: Sequence[float], staleness: Sequence[int], even: list[float], gram: Gram) -> _Weighing:
    """Compute the geometric median by smoothed Weiszfeld iterations (Pillutla et al., "Robust Aggregation for
    Federated Learning", 2022).

    The median is a convex combination of the δ_i, so the iteration runs on its coefficients: with w,
    ‖δ_i − Σ w_k δ_k‖² = G_ii − 2 (G w)_i + wᵀ G w. Rounded to 12 digits before use.
    """
    count = len(even)
    smooth = 1e-6 * math.sqrt(max(float(np.diag(gram).max()), 1e-300))
    weights = list(even)
    for _ in range(_WEISZFELD_ROUNDS):
        products = [math.fsum(float(gram[i, k]) * weights[k] for k in range(count)) for i in range(count)]
        centre = math.fsum(weights[i] * products[i] for i in range(count))
        squares = [max(0.0, float(gram[i, i]) - 2 * products[i] + centre) for i in range(count)]
        pulls = [even[i] / max(smooth, math.sqrt(squares[i])) for i in range(count)]
        total = math.fsum(pulls)
        updated = [pull / total for pull in pulls]
        settled = max(abs(a - b) for a, b in zip(updated, weights, strict=True)) < 1e-12
        weights = updated
        if settled:
            break
    return _only({i: round(weight, 12) for i, weight in enumerate(weights)}, count)


def _norm_clipped(utilities: Sequence[float], staleness: Sequence[int], even: list[float], gram: Gram) -> _Weighing:
    norms = np.sqrt(np.diag(gram))
    median = float(np.median(norms))
    return even, [min(1.0, median / float(norm)) if norm > 0 else 1.0 for norm in norms]


_WEIGHINGS: dict[str, Callable[[Sequence[float], Sequence[int], list[float], Gram], _Weighing]] = {
    "mean": _mean,
    "utility-mean": _utility_mean,
    "top-1": _top_1,
    "coordinate-median": _mean,
    "trimmed-mean": _mean,
    "krum": _krum,
    "multi-krum": _multi_krum,
    "geometric-median": _geometric_median,
    "norm-clipped-mean": _norm_clipped,
}


def aggregate(how: Plan, deltas: Deltas, name: str) -> NDArray[np.float64]:
    """Return Δ of one tensor, float64."""
    by_expert = how.shares_of(name)
    if by_expert is not None:
        return _aggregate_by_expert(how, by_expert, deltas, name)
    if how.kind in COORDINATE_WISE:
        stacked = np.sort(np.stack([deltas.load(i, name) for i in range(deltas.count)]), axis=0)
        return _middle(stacked, _trimmed(deltas.count, how.kind))
    total: NDArray[np.float64] | None = None
    for index, (weight, factor) in enumerate(zip(how.weights, how.factors, strict=True)):
        if weight > 0.0:
            rows = deltas.load(index, name)
            first, total = total is None, np.empty(rows.shape) if total is None else total
            _add(total, rows, weight * factor, first=first)
    assert total is not None, "the weights of a plan sum to 1"
    return total


def _add(total: NDArray[np.float64], rows: NDArray[np.float32], scale: float, *, first: bool) -> None:
    """Add scaled rows to a sum, or begin it with them, block by block: what is in between stays in a core's cache."""
    out, flat = total.reshape(-1), rows.reshape(-1)
    block = np.empty(min(CHUNK, len(flat)))
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        if first:
            np.multiply(flat[part], scale, out=out[part], dtype=np.float64)
        else:
            out[part] += np.multiply(flat[part], scale, out=block[: len(flat) - start], dtype=np.float64)


def _aggregate_by_expert(how: Plan, by_expert: Shares, deltas: Deltas, name: str) -> NDArray[np.float64]:
    if how.kind in {"coordinate-median", "trimmed-mean"}:
        stacked = np.stack([deltas.load(i, name) for i in range(deltas.count)])
        found = middle(stacked, by_expert.weights, 0.5 if how.kind == "coordinate-median" else TRIM)
        return found * along(by_expert.mass, found)
    total: NDArray[np.float64] | None = None
    for index, (weights, factors) in enumerate(zip(by_expert.weights, by_expert.factors, strict=True)):
        rows = deltas.load(index, name)
        first, total = total is None, np.empty(rows.shape) if total is None else total
        for expert, scale in enumerate(weights * factors * by_expert.mass):
            _add(total[expert], rows[expert], float(scale), first=first)
    assert total is not None, "a merge has submissions"
    return total


def _trimmed(count: int, kind: str) -> int:
    """Return how many sorted values to drop at either end; trimmed-mean drops at least one from three on."""
    if kind == "coordinate-median":
        return (count - 1) // 2
    return min(max(int(TRIM * count), 1), (count - 1) // 2)


def _middle(ordered: NDArray[np.float32], dropped: int) -> NDArray[np.float64]:
    kept = ordered[dropped : len(ordered) - dropped]
    total = kept[0].astype(np.float64)
    for row in kept[1:]:
        total = total + row
    return np.asarray(total / len(kept))


def outer_step(
    theta: NDArray[np.float32],
    delta: NDArray[np.float64],
    momentum: NDArray[np.float32] | None,
    learning_rate: float,
    mu: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return one outer step on a tensor: (θ_{t+1}, momentum), as `torch.optim.SGD(nesterov=True)` with Δ as the
    gradient.

    b ← μ·b + Δ;  θ ← θ − lr·(Δ + μ·b). None for momentum means zero, how a run and new rows start. lr 1, μ 0 is the
    weighted average of the θ_i (DiLoCo, Douillard et al., 2023).
    """
    if momentum is None:
        velocity = delta
    else:
        velocity = momentum.astype(np.float64)
        velocity *= mu
        velocity += delta
    step = np.multiply(velocity, mu)
    step += delta
    step *= learning_rate
    stepped = np.subtract(theta, step, out=step, dtype=np.float64)
    return stepped.astype(np.float32), velocity.astype(np.float32)


def step_tensor(
    how: Plan,
    deltas: Deltas,
    name: str,
    theta: NDArray[np.float32],
    momentum: NDArray[np.float32] | None,
    learning_rate: float,
    mu: float,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return (θ_{t+1}, momentum) of one tensor. Experts that nobody used keep both."""
    stepped, speed = outer_step(theta, aggregate(how, deltas, name), momentum, learning_rate, mu)
    by_expert = how.shares_of(name)
    if by_expert is not None and not by_expert.used.all():
        resting = ~by_expert.used
        stepped[resting] = theta[resting]
        speed[resting] = 0.0 if momentum is None else momentum[resting]
    return stepped, speed


@dataclass(frozen=True)
class OuterStep:
    """The start and size of an outer step; without a momentum file, momentum starts at zero."""

    parent: Path
    momentum: Path | None
    learning_rate: float
    mu: float


@dataclass(frozen=True)
class Stepped:
    """SHA-256 in hex and bytes of the two files that a step wrote."""

    state: tuple[str, int]
    momentum: tuple[str, int]


def write_step(
    how: Plan,
    deltas: Deltas,
    step: OuterStep,
    out_state: Path,
    out_momentum: Path,
    coded: tuple[Codec, Path] | None = None,
) -> Stepped:
    """Write θ_{t+1} and the new outer momentum to files, one tensor for each core in memory at a time. `coded`: also the coded
    step, by this codec to this file, and θ_{t+1} is what it decodes to.

    The state keeps the parent's names, shapes, dtypes and metadata; momentum is float32 over the same rows. Raises
    `Invalid` (NON_FINITE) where a number overflows.
    """
    header = read_header(step.parent)
    layout: Layout = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
    speeds: Layout = {name: ("F32", shape) for name, (_, shape) in layout.items()}
    # Where every number is looked at by itself, all submissions' rows of a tensor are in memory.
    at_once = 1 if how.kind in COORDINATE_WISE else usable_cores()
    coder = None if coded is None else coded[0]
    with (
        ThreadPoolExecutor(at_once) as pool,
        nullcontext() if coded is None else coded[1].open("wb") as file,
        TensorWriter(out_state, layout, header.metadata) as state,
        TensorWriter(out_momentum, speeds) as velocity,
    ):
        if file is not None and coder is not None:
            file.write(head(coder))
        # Same dtype everywhere in a state, hence the same order in both files, by name.
        assert state.names == velocity.names == sorted(layout), "a state has one dtype"
        for start in range(0, len(state.names), at_once):
            names = state.names[start : start + at_once]
            made = pool.map(lambda name: _stepped(how, deltas, step, name, layout[name][0], coder), names)
            for name, (rounded, speed, code) in zip(names, made, strict=True):
                state.write(name, rounded)
                velocity.write(name, speed)
                if file is not None:
                    file.write(code)
    return Stepped((state.digest, state.size), (velocity.digest, velocity.size))


def _stepped(
    how: Plan, deltas: Deltas, step: OuterStep, name: str, dtype: str, coder: Codec | None
) -> tuple[Array, NDArray[np.float32], bytes]:
    """Return one tensor of the next state, as it is stored, and of the momentum; and the coded step."""
    before = None if step.momentum is None else load_float32(step.momentum, name)
    with np.errstate(over="ignore", invalid="ignore"):
        theta = load_float32(step.parent, name)
        stepped, speed = step_tensor(how, deltas, name, theta, before, step.learning_rate, step.mu)
        rounded = from_float32(stepped, dtype)
    if not (np.isfinite(to_float32(rounded, dtype)).all() and np.isfinite(speed).all()):
        raise Invalid(f"merging {name} overflows", reason=reasons.REASON_NON_FINITE, about=name)
    if coder is None:
        return rounded, speed, b""
    code, decoded = code_step(coder, name, theta, rounded, dtype)
    return decoded, speed, code
