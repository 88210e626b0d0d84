"""Every aggregator against another way to the same number, written from the papers, over random submissions."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.protocol.merging.aggregators import OuterStep, aggregate, plan, write_step
from connito.protocol.policy.choices import AGGREGATORS
from numpy.typing import NDArray
from scipy import optimize, stats

from tests.support.files import write_tensors

Rows = NDArray[np.float64]
SIZES = {"layers.0.a": (3, 5), "layers.1.b": (4,)}
DIMENSIONS = 19


class Flat:
    """Submissions as rows [n, 19], handed out tensor by tensor."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows.astype(np.float32)
        self.names = sorted(SIZES)
        self.count = len(rows)

    def load(self, index: int, name: str) -> NDArray[np.float32]:
        cut = 15 if name == "layers.1.b" else 0
        return self.rows[index, cut : cut + int(np.prod(SIZES[name]))].reshape(SIZES[name])


def merged(kind: str, rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    deltas = Flat(rows)
    how = plan(kind, utilities, staleness, gram_matrix(deltas))
    return np.concatenate([aggregate(how, deltas, name).reshape(-1) for name in deltas.names])


def _even(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    return np.average(rows, axis=0, weights=[1 / (1 + age) for age in staleness])


def _by_utility(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    return np.average(rows, axis=0, weights=np.divide(utilities, np.add(staleness, 1)))


def _best(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    best: NDArray[np.float64] = rows[max(range(len(rows)), key=lambda i: (utilities[i], -staleness[i], -i))]
    return best


def _median(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    return np.median(rows, axis=0)


def _trimmed(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    """scipy's, cutting a fifth at either end and at least one of three."""
    cut = min(max(int(0.2 * len(rows)), 1), (len(rows) - 1) // 2)
    return np.asarray(stats.trim_mean(rows, cut / len(rows) + 1e-9, axis=0))


def _krum_scores(rows: Rows) -> tuple[list[float], int]:
    """Blanchard et al. 2017, eq. 4: over all subsets of n − f − 2 others, the least sum of squared distances."""
    count = len(rows)
    faulty = max(0, (count - 3) // 2)
    near = max(1, count - faulty - 2)
    scores = []
    for i in range(count):
        apart = [float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(count) if j != i]
        scores.append(min(sum(group) for group in itertools.combinations(apart, near)))
    return scores, faulty


def _krum(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    if len(rows) <= 2:
        return _best(rows, utilities, staleness)
    chosen: NDArray[np.float64] = rows[int(np.argmin(_krum_scores(rows)[0]))]
    return chosen


def _multi_krum(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    if len(rows) <= 2:
        return _even(rows, utilities, staleness)
    scores, faulty = _krum_scores(rows)
    kept = np.argsort(scores, kind="stable")[: len(rows) - max(faulty, 1)]
    return np.average(rows[kept], axis=0, weights=[1 / (1 + staleness[i]) for i in kept])


def _geometric(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    """The minimiser of the weighted sum of distances, found by a general-purpose optimiser in the space itself."""
    weights = np.array([1 / (1 + age) for age in staleness])

    def cost(point: Rows) -> Any:
        return float(weights @ np.sqrt(np.sum((rows - point) ** 2, axis=1) + 1e-14))

    starts = [np.average(rows, axis=0, weights=weights), *rows]
    found = [optimize.minimize(cost, start, method="BFGS", options={"gtol": 1e-9, "maxiter": 2000}) for start in starts]
    return np.asarray(min(found, key=lambda result: result.fun).x)


def _clipped(rows: Rows, utilities: list[float], staleness: list[int]) -> Rows:
    norms = np.linalg.norm(rows, axis=1)
    return _even(rows * np.minimum(1, np.median(norms) / norms)[:, None], utilities, staleness)


ORACLES: dict[str, Callable[[Rows, list[float], list[int]], Rows]] = {
    "mean": _even,
    "utility-mean": _by_utility,
    "top-1": _best,
    "coordinate-median": _median,
    "trimmed-mean": _trimmed,
    "krum": _krum,
    "multi-krum": _multi_krum,
    "geometric-median": _geometric,
    "norm-clipped-mean": _clipped,
}


def test_every_aggregator_has_an_oracle() -> None:
    assert ORACLES.keys() == set(AGGREGATORS)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("kind", sorted(ORACLES))
def test_an_aggregator_agrees_with_its_oracle(kind: str, count: int) -> None:
    rng = np.random.default_rng(count)
    for trial in range(2 if kind == "geometric-median" else 4):
        rows = rng.normal(size=DIMENSIONS) + rng.normal(size=(count, DIMENSIONS))
        if trial % 2 and count > 3:
            rows[-1] *= -50.0
        rows = rows.astype(np.float32).astype(np.float64)
        utilities = [float(value) for value in rng.uniform(0.01, 1, count)]
        staleness = [int(value) for value in rng.integers(0, 3, count)]
        expected = ORACLES[kind](rows, utilities, staleness)
        found = merged(kind, rows, utilities, staleness)
        # The geometric median is flat around its minimum: its cost agrees to far more digits than its place.
        loose = 2e-3 if kind == "geometric-median" else 1e-6
        np.testing.assert_allclose(found, expected, rtol=loose, atol=loose * float(np.abs(expected).max()))


@pytest.mark.parametrize("kind", ["coordinate-median", "trimmed-mean", "krum", "multi-krum", "geometric-median"])
@pytest.mark.parametrize(("count", "faulty"), [(5, 1), (7, 2), (9, 3)])
def test_a_minority_moves_a_robust_merge_no_further_than_honest_ones_lie_apart(
    kind: str, count: int, faulty: int
) -> None:
    """Whatever f of n say, the merge stays within the honest ones' spread of their mean; a plain mean does not."""
    rng = np.random.default_rng(count)
    honest = rng.normal(size=DIMENSIONS) + 0.3 * rng.normal(size=(count - faulty, DIMENSIONS))
    centre = honest.mean(axis=0)
    radius = float(np.linalg.norm(honest - centre, axis=1).max())
    for lie in (-1e4 * centre, 1e6 * rng.normal(size=DIMENSIONS), np.full(DIMENSIONS, 1e5), -3 * centre):
        rows = np.concatenate([honest, np.tile(lie, (faulty, 1)) + 1e-3 * rng.normal(size=(faulty, DIMENSIONS))])
        order = rng.permutation(count)
        allowed = 2.0 * radius
        if kind == "trimmed-mean" and faulty > max(int(0.2 * count), 1):
            continue  # it cuts a fifth at either end: beyond that it promises nothing
        assert float(np.linalg.norm(merged(kind, rows[order], [1.0] * count, [0] * count) - centre)) <= allowed
        assert float(np.linalg.norm(merged("mean", rows[order], [1.0] * count, [0] * count) - centre)) > 0.5 * radius


@pytest.mark.parametrize("kind", sorted(AGGREGATORS))
def test_memory_is_one_tensor_of_each_submission_whatever_the_number_of_tensors(kind: str, tmp_path: Path) -> None:
    peaks = [_peak(kind, tmp_path / str(tensors), tensors) for tensors in (3, 12)]
    assert peaks[1] < 1.2 * peaks[0] + 200_000
    # Per submission one float32 tensor, and its float64 copies while inner products are summed; then a few of the merge.
    assert peaks[1] < (6 * COUNT + 12) * ELEMENTS * 4


COUNT, ELEMENTS = 5, 40_000


def _peak(kind: str, folder: Path, tensors: int) -> int:
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"layers.{i}.w" for i in range(tensors)]
    for index in range(COUNT + 1):
        write_tensors(folder / str(index), {n: rng.normal(size=ELEMENTS).astype(np.float32) for n in names})
    deltas = DeltaFiles([folder / str(i) for i in range(COUNT)], [folder / str(COUNT)] * COUNT)
    tracemalloc.start()
    try:
        how = plan(kind, [0.5, 0.4, 0.3, 0.2, 0.1], [0] * COUNT, gram_matrix(deltas))
        write_step(how, deltas, OuterStep(folder / str(COUNT), None, 0.7, 0.9), folder / "state", folder / "momentum")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
