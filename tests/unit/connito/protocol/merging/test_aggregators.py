from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.data.tensors import from_float32, read_header, read_tensors
from connito.errors import Invalid
from connito.protocol.merging import aggregators
from connito.protocol.merging.aggregators import OuterStep, aggregate, outer_step, plan, plan_by_expert, write_step
from connito.protocol.policy.choices import AGGREGATORS
from connito.v1 import reasons_pb2
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.support.files import write_tensors


@dataclass
class Arrays:
    """Pseudo-gradients in memory: rows [n, d] as one tensor `w`."""

    rows: np.ndarray
    names = ("w",)

    @property
    def count(self) -> int:
        return len(self.rows)

    def load(self, index: int, name: str) -> np.ndarray:
        assert name in ("w", "layers.0.w")
        row: NDArray[Any] = self.rows[index]
        return row


def merged(
    kind: str, rows: np.ndarray, utilities: list[float] | None = None, staleness: list[int] | None = None
) -> np.ndarray:
    deltas = Arrays(np.asarray(rows, np.float32))
    how = plan(kind, utilities or [1.0] * len(rows), staleness or [0] * len(rows), gram_matrix(deltas))
    assert sum(how.weights) == pytest.approx(1.0)
    assert min(how.weights) >= 0.0
    return aggregate(how, deltas, "w")


RNG = np.random.default_rng(5)
HONEST = (np.ones(64) + 0.1 * RNG.normal(size=(5, 64))).astype(np.float32)


def test_means_and_the_best() -> None:
    rows = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    np.testing.assert_allclose(merged("mean", rows), [1, 1], rtol=1e-7)
    np.testing.assert_allclose(merged("utility-mean", rows, [0.3, 0.1, 0.0]), [0.75, 0.25])
    np.testing.assert_array_equal(merged("top-1", rows, [0.1, 0.3, 0.2]), [0, 1])


def test_the_weight_of_stale_work_is_divided() -> None:
    rows = np.array([[1.0], [0.0]])
    assert merged("mean", rows, staleness=[1, 0]) == pytest.approx([1 / 3])
    assert merged("utility-mean", rows, [0.3, 0.3], [2, 0]) == pytest.approx([0.25])


def test_coordinates_by_themselves() -> None:
    rows = np.array([[0.0, 5.0], [1.0, 6.0], [100.0, -100.0], [2.0, 7.0], [3.0, 8.0]])
    np.testing.assert_array_equal(merged("coordinate-median", rows), [2, 6])
    np.testing.assert_array_equal(merged("coordinate-median", rows[:4]), np.median(rows[:4], 0))
    np.testing.assert_array_equal(merged("trimmed-mean", rows), [2, 6])
    np.testing.assert_array_equal(merged("trimmed-mean", rows[:2]), rows[:2].mean(0))


def test_clipping_keeps_directions_and_bounds_lengths() -> None:
    rows = np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 4000.0]])
    np.testing.assert_allclose(merged("norm-clipped-mean", rows), [1.0, 8 / 3], rtol=1e-9)


def test_the_geometric_median_is_where_distances_are_least() -> None:
    from scipy.optimize import minimize

    rows = RNG.normal(size=(7, 3)).astype(np.float32)
    found = merged("geometric-median", rows)

    def distances(point: np.ndarray) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    best = minimize(distances, rows.mean(0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    assert distances(found) == pytest.approx(best.fun, rel=1e-6)


@pytest.mark.parametrize("kind", ["coordinate-median", "trimmed-mean", "krum", "multi-krum", "geometric-median"])
def test_one_liar_among_six_does_not_move_the_robust_ones(kind: str) -> None:
    rows = np.concatenate([HONEST, [-50 * np.ones(64)]])
    honest = HONEST.mean(0)
    assert np.linalg.norm(merged("mean", rows) - honest) > 10
    assert np.linalg.norm(merged(kind, rows) - honest) < 2.5


def test_krum_takes_one_that_was_submitted() -> None:
    rows = np.concatenate([HONEST, [-50 * np.ones(64)]])
    assert any(np.array_equal(merged("krum", rows), row) for row in HONEST)


@pytest.mark.parametrize("kind", AGGREGATORS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_submissions_and_equal_ones(kind: str, count: int) -> None:
    row = np.array([1.5, -2.0, 0.25])
    np.testing.assert_allclose(merged(kind, np.tile(row, (count, 1))), row, rtol=1e-9)
    np.testing.assert_array_equal(merged(kind, np.zeros((count, 3))), np.zeros(3))


@pytest.mark.parametrize("kind", AGGREGATORS)
@given(shift=st.integers(0, 4))
def test_a_merge_lies_within_what_was_submitted(kind: str, shift: int) -> None:
    rows = np.roll(HONEST, shift, 0)
    found = merged(kind, rows, [0.1, 0.2, 0.3, 0.4, 0.5], [0, 1, 0, 2, 0])
    low = 0 if kind == "norm-clipped-mean" else rows.min(0)
    assert np.all(found <= rows.max(0) + 1e-6)
    assert np.all(found >= low - 1e-6)


def test_unknown_names_and_nothing_to_merge_are_refused() -> None:
    with pytest.raises(Invalid, match="coordinate-median") as raised:
        plan("average", [1.0], [0], np.eye(1))
    assert raised.value.reason == reasons_pb2.REASON_BAD_SPEC
    with pytest.raises(Invalid, match="nothing to merge"):
        plan("mean", [], [], np.zeros((0, 0)))
    with pytest.raises(Invalid, match="nothing to merge"):
        plan("utility-mean", [0.0], [0], np.eye(1))


@pytest.mark.parametrize(("lr", "mu"), [(0.7, 0.9), (1.0, 0.0), (0.5, 0.5)])
def test_the_outer_step_is_torchs_nesterov(lr: float, mu: float) -> None:
    torch = pytest.importorskip("torch")
    theta = RNG.normal(size=50).astype(np.float32)
    parameter = torch.nn.Parameter(torch.from_numpy(theta.astype(np.float64)))
    reference = torch.optim.SGD([parameter], lr=lr, momentum=mu, nesterov=mu > 0)
    momentum = None
    for _ in range(6):
        delta = RNG.normal(size=50)
        parameter.grad = torch.from_numpy(delta)
        reference.step()
        theta, momentum = outer_step(theta, delta, momentum, lr, mu)
    np.testing.assert_allclose(theta, parameter.detach().numpy(), atol=3e-6)


def test_plain_steps_are_the_weighted_average_of_the_states() -> None:
    theta = RNG.normal(size=64).astype(np.float32)
    states = theta - HONEST
    deltas = Arrays(theta - states)
    how = plan("utility-mean", [1.0, 2.0, 3.0, 4.0, 5.0], [0] * 5, gram_matrix(deltas))
    stepped, _ = outer_step(theta, aggregate(how, deltas, "w"), None, 1.0, 0.0)
    np.testing.assert_allclose(stepped, np.average(states, 0, [1, 2, 3, 4, 5]), atol=1e-6)


def states(folder: Path, dtype: str, count: int = 3) -> tuple[Any, ...]:
    shapes = {"layers.0.down_proj": (2, 4, 6), "layers.0.gate_up_proj": (2, 12, 4)}
    paths = []
    for index in range(count + 1):
        values = {n: from_float32(RNG.normal(size=s).astype(np.float32), dtype) for n, s in shapes.items()}
        paths.append(folder / f"state{index}")
        write_tensors(paths[-1], values, {"kind": "state"}, dtypes=dict.fromkeys(values, dtype))
    return paths[0], DeltaFiles(paths[1:], [paths[0]] * count)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_step_over_files_keeps_the_layout_and_repeats_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    parent, deltas = states(tmp_path, dtype)
    how = plan("mean", [1.0] * 3, [0] * 3, gram_matrix(deltas))
    outputs = []
    for attempt in ("x", "y"):
        state, momentum = tmp_path / f"{attempt}s", tmp_path / f"{attempt}m"
        write_step(how, deltas, OuterStep(parent, None, 0.7, 0.9), state, momentum)
        write_step(
            how, deltas, OuterStep(state, momentum, 0.7, 0.9), tmp_path / f"{attempt}s2", tmp_path / f"{attempt}m2"
        )
        outputs.append([(tmp_path / f"{attempt}{kind}").read_bytes() for kind in ("s", "m", "s2", "m2")])
    assert outputs[0] == outputs[1]
    assert read_header(tmp_path / "xs").entries == read_header(parent).entries
    assert read_header(tmp_path / "xs").metadata == {"kind": "state"}
    assert {entry.dtype for entry in read_header(tmp_path / "xm").entries.values()} == {"F32"}


def test_plain_step_over_files_is_the_mean_of_the_files(tmp_path: Path) -> None:
    parent, deltas = states(tmp_path, "F32")
    how = plan("mean", [1.0] * 3, [0] * 3, gram_matrix(deltas))
    write_step(how, deltas, OuterStep(parent, None, 1.0, 0.0), tmp_path / "s", tmp_path / "m")
    found, _ = read_tensors(tmp_path / "s")
    for name, array in found.items():
        mean = np.mean([read_tensors(path)[0][name] for path in deltas.states], axis=0)
        np.testing.assert_allclose(array, mean, atol=1e-6)


def test_overflow_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    large = np.full(4, 3e38, np.float32)
    write_tensors(tmp_path / "a", {"w": large})
    write_tensors(tmp_path / "b", {"w": large * np.float32(0.5)})
    deltas = DeltaFiles([tmp_path / "a"], [tmp_path / "b"])
    how = plan("mean", [1.0], [0], gram_matrix(deltas))
    with pytest.raises(Invalid, match="overflows") as raised:
        write_step(how, deltas, OuterStep(tmp_path / "b", None, 5.0, 0.9), tmp_path / "s", tmp_path / "m")
    assert raised.value.reason == reasons_pb2.REASON_NON_FINITE
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize("chunk", [1, 4, 5, 1 << 15])
def test_sums_block_by_block_are_those_of_whole_arrays(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is published is recomputed bit for bit, whatever fits a core's cache."""
    monkeypatch.setattr(aggregators, "CHUNK", chunk)
    rows = np.random.default_rng(3).standard_normal((3, 2, 5, 3), np.float32)
    rows[:, 0, 0, 0] = -0.0
    whole = plan("mean", [1.0] * 3, [0, 1, 3], np.eye(3))
    by_expert = plan_by_expert("mean", [1.0] * 3, [0, 1, 3], {0: np.array([[4, 1], [2, 0], [1, 9]])})
    deltas = Arrays(rows)
    factors = [weight * factor for weight, factor in zip(whole.weights, whole.factors, strict=True)]
    start = np.full(rows.shape[1:], -0.0)
    expected: Any = sum((row.astype(np.float64) * by for row, by in zip(rows, factors, strict=True)), start=start)
    assert aggregate(whole, deltas, "layers.0.w").tobytes() == expected.tobytes()
    shares = by_expert.experts[0]
    scales = [of * by * shares.mass for of, by in zip(shares.weights, shares.factors, strict=True)]
    expected = sum(
        (row.astype(np.float64) * scale.reshape(-1, 1, 1) for row, scale in zip(rows, scales, strict=True)), start=start
    )
    assert aggregate(by_expert, deltas, "layers.0.w").tobytes() == expected.tobytes()
