"""Merging expert by expert: whose word counts for which rows, and what stays as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles, expert_grams, gram_matrix
from connito.data.tensors import TensorWriter, read_tensors
from connito.errors import Invalid
from connito.protocol.claims import counts_of
from connito.protocol.merging.aggregators import Plan, aggregate, plan, plan_by_expert, step_tensor
from connito.protocol.merging.by_expert import JUDGED, judged, middle, of_equal_mass, strengths, use_of
from connito.protocol.merging.candidates import Attempt, MergeInputs, write_candidate
from connito.protocol.policy.choices import AGGREGATORS
from connito.v1 import cycle_pb2, run_pb2

NAMES = ("layers.1.down_proj", "layers.1.up_proj", "layers.4.down_proj")


class Memory:
    """Pseudo-gradients that are in memory."""

    def __init__(self, deltas: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.deltas = deltas
        self.names, self.count = sorted(deltas[0]), len(deltas)

    def load(self, index: int, name: str) -> np.ndarray:
        return self.deltas[index][name]


def drawn(miners: int, experts: int = 3, seed: int = 0) -> Memory:
    rng = np.random.default_rng(seed)
    shape = (experts, 2, 5)
    return Memory([{name: rng.standard_normal(shape).astype(np.float32) for name in NAMES} for _ in range(miners)])


def claims(seed: int, miners: int, experts: int = 3, low: int = 0) -> dict[int, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {layer: rng.integers(low, 900, (miners, experts)).astype(float) for layer in (1, 4)}


def made(aggregator: str, deltas: Memory, routed: Mapping[int, np.ndarray], utilities: Sequence[float] = ()) -> Plan:
    worth = list(utilities) or [1.0] * deltas.count
    return plan_by_expert(aggregator, worth, [0] * deltas.count, routed, expert_grams(deltas))


def test_the_mean_weighs_each_row_by_the_tokens_that_were_routed_to_it() -> None:
    deltas, routed = drawn(4), claims(1, 4)
    how = made("mean", deltas, routed)
    for name in NAMES:
        counts = routed[int(name.split(".")[1])]
        for expert in range(3):
            share = counts[:, expert] / counts[:, expert].sum()
            wanted = sum(share[i] * deltas.load(i, name)[expert].astype(np.float64) for i in range(4))
            np.testing.assert_allclose(aggregate(how, deltas, name)[expert], wanted, rtol=1e-12)
    assert sum(how.weights) == pytest.approx(1.0, abs=1e-12)


def test_utilities_and_staleness_count_beside_the_tokens() -> None:
    deltas, routed = drawn(2), {layer: np.array([[30.0] * 3, [10.0] * 3]) for layer in (1, 4)}
    how = plan_by_expert("utility-mean", [0.1, 0.3], [0, 1], routed)
    # 30 · 0.1 against 10 · 0.3 / 2
    np.testing.assert_allclose(how.experts[1].weights[:, 0], [2 / 3, 1 / 3])
    even = plan_by_expert("mean", [0.1, 0.3], [0, 1], routed)
    np.testing.assert_allclose(even.experts[1].weights[:, 0], [6 / 7, 1 / 7])
    assert deltas.count == 2


@pytest.mark.parametrize("aggregator", AGGREGATORS)
@pytest.mark.parametrize("miners", [1, 2, 3, 6])
def test_with_equal_counts_each_expert_is_merged_as_if_it_were_the_whole_submission(
    aggregator: str, miners: int
) -> None:
    deltas, utilities = drawn(miners), [0.1 * (i + 1) for i in range(miners)]
    how = made(aggregator, deltas, {layer: np.full((miners, 3), 7.0) for layer in (1, 4)}, utilities)
    for layer in (1, 4):
        for expert in range(3):
            names = [name for name in NAMES if name.startswith(f"layers.{layer}.")]
            alone = Memory([{name: one[name][expert : expert + 1] for name in names} for one in deltas.deltas])
            whole = plan(aggregator, utilities, [0] * miners, gram_matrix(alone))
            for name in names:
                if aggregator == "trimmed-mean" and miners == 6:
                    continue  # by weight, a share of the outermost that remain is kept
                np.testing.assert_allclose(
                    aggregate(how, deltas, name)[expert], aggregate(whole, alone, name)[0], rtol=1e-6, atol=1e-9
                )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("trim", [0.2, 0.5])
def test_the_weighted_middle_is_that_of_values_repeated_by_their_weight(seed: int, trim: float) -> None:
    rng = np.random.default_rng(seed)
    repeats = rng.integers(0, 40, 5)
    repeats[0] = max(1, repeats[0])
    values = rng.standard_normal((5, 1, 4)).astype(np.float32)
    found = middle(values, (repeats / repeats.sum())[:, None], trim)
    dropped = min(max(trim, repeats.max() / repeats.sum()), 0.5)
    many = np.sort(np.repeat(values[:, 0].astype(np.float64), repeats * 2, axis=0), axis=0)
    cut = round(dropped * len(many))
    wanted = np.median(many, axis=0) if dropped == 0.5 else many[cut : len(many) - cut].mean(axis=0)
    np.testing.assert_allclose(found[0], wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aggregator", ["coordinate-median", "geometric-median", "krum", "trimmed-mean"])
def test_a_robust_aggregator_bounds_a_minority_in_the_one_expert_that_it_attacks(aggregator: str) -> None:
    deltas = drawn(5)
    for name in NAMES:
        deltas.deltas[2][name][1] = 1e4
    how = made(aggregator, deltas, {layer: np.full((5, 3), 50.0) for layer in (1, 4)})
    assert all(float(np.abs(aggregate(how, deltas, name)).max()) < 10 for name in NAMES)


def test_a_minority_of_users_is_a_majority_of_nobody_else() -> None:
    """Of an expert that two used, the others' rows do not vote, whatever they hold."""
    deltas = drawn(6)
    routed = {layer: np.array([[9.0, 9, 9]] * 2 + [[0.0, 9, 9]] * 4) for layer in (1, 4)}
    for index in range(2, 6):
        for name in NAMES:
            deltas.deltas[index][name][0] = -1e6
    for aggregator in AGGREGATORS:
        how = made(aggregator, deltas, routed)
        assert float(np.abs(aggregate(how, deltas, NAMES[0])[0]).max()) < 10, aggregator


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_an_expert_that_nobody_used_keeps_rows_and_momentum_to_the_bit(aggregator: str) -> None:
    deltas, routed = drawn(3), claims(2, 3, low=1)
    routed[1][:, 2] = 0
    how = made(aggregator, deltas, routed)
    rng = np.random.default_rng(9)
    theta, before = (rng.standard_normal((3, 2, 5)).astype(np.float32) for _ in range(2))
    stepped, speed = step_tensor(how, deltas, NAMES[0], theta, before, 0.7, 0.9)
    assert stepped[2].tobytes() == theta[2].tobytes()
    assert speed[2].tobytes() == before[2].tobytes()
    assert not np.array_equal(stepped[:2], theta[:2])
    resting = step_tensor(how, deltas, NAMES[0], theta, None, 0.7, 0.9)[1]
    assert not resting[2].any()


def test_with_no_expert_used_there_is_nothing_to_merge() -> None:
    with pytest.raises(Invalid, match="no expert was used"):
        plan_by_expert("mean", [1.0], [0], {1: np.zeros((1, 3))})


def test_equal_mass_leaves_proportions_and_takes_the_volume() -> None:
    loud = of_equal_mass({1: np.array([[100.0, 300.0], [1000.0, 3000.0], [60.0, 20.0]])})[1]
    np.testing.assert_allclose(loud, [[100, 300], [100, 300], [300, 100]])
    assert not of_equal_mass({1: np.zeros((2, 2))})[1].any()


def test_whoever_claims_nothing_counts_as_the_mean_of_those_who_do() -> None:
    found = counts_of([{1: [10, 0]}, None, {1: [30, 40]}])
    np.testing.assert_allclose(found[1], [[10, 0], [20, 20], [30, 40]])
    assert counts_of([None, None]) == {}


def test_what_a_miners_text_uses_as_the_target_does_is_judged_in_full() -> None:
    use = {1: np.array([0.1, 0.3, 0.6])}
    same = strengths({1: np.array([[10.0, 30.0, 60.0]])}, use)[1]
    specialist = strengths({1: np.array([[900.0, 90.0, 0.0]])}, use)[1]
    np.testing.assert_allclose(same, [[1, 1, 1]])
    # 90 of 990 tokens, where the target has three of ten
    np.testing.assert_allclose(specialist, [[1, 90 / 990 / 0.3, 0]])
    assert strengths({1: np.zeros((1, 3))}, use)[1].tolist() == [[0.0, 0.0, 0.0]]
    assert strengths({1: np.array([[1.0, 0.0]])}, {1: np.array([0.0, 1.0])})[1].tolist() == [[1.0, 0.0]]
    assert strengths({1: np.array([[9.0, 0.0]])}, {})[1].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("seed", range(20))
def test_no_expert_goes_into_a_merge_more_strongly_than_its_use_allows(seed: int) -> None:
    """Whoever is merged beside it: those who were judged with it may be refused, or be accomplices."""
    rng = np.random.default_rng(seed)
    miners = int(rng.integers(1, 6))
    counts = {layer: np.floor(rng.pareto(0.7, (miners, 4)) * 20) + 1 for layer in (1, 4)}
    counts[4][:, 0] *= rng.integers(0, 2, miners)
    use = {layer: rng.pareto(0.7, 4) for layer in (1, 4)}
    how = plan_by_expert("mean", [1.0] * miners, rng.integers(0, 3, miners).tolist(), counts, None, use)
    for layer, shares in how.experts.items():
        assert (shares.weights * shares.mass <= strengths(counts, use)[layer] * (1 + 1e-12)).all()


@pytest.mark.parametrize("aggregator", AGGREGATORS)
def test_an_expert_that_the_merged_used_little_takes_a_shorter_step(aggregator: str) -> None:
    deltas, counts = drawn(3), {layer: np.array([[50.0, 1, 49]] * 3) for layer in (1, 4)}
    use = {layer: np.array([50.0, 50, 0]) for layer in (1, 4)}
    grams = expert_grams(deltas)
    full, short = (plan_by_expert(aggregator, [1.0, 2.0, 3.0], [0] * 3, counts, grams, of) for of in ({}, use))
    for name in NAMES:
        wanted = aggregate(full, deltas, name) * np.array([1.0, 0.02, 1.0]).reshape(3, 1, 1)
        np.testing.assert_allclose(aggregate(short, deltas, name), wanted, rtol=1e-12)


def test_who_claims_nothing_is_judged_whole_and_so_is_everybody_where_the_selection_says_no_use() -> None:
    layer = run_pb2.LayerSelection(layer=1, experts=[4, 2], use=[0.5, 0.5])
    claimed = [{1: [30, 10]}, None]
    found = judged(claimed, use_of(run_pb2.SelectionMade(layers=[layer])))
    np.testing.assert_allclose(found[1], [[JUDGED, JUDGED * 0.5], [1.0, 1.0]])
    del layer.use[:]
    assert judged(claimed, use_of(run_pb2.SelectionMade(layers=[layer]))) == {}


def test_the_best_alone_is_stepped_to_as_it_was_judged(tmp_path: Path) -> None:
    parent = _file(tmp_path / "parent", np.ones((2, 4), np.float32))
    states = [_file(tmp_path / f"s{i}", np.full((2, 4), float(i + 2), np.float32)) for i in range(2)]
    deltas = DeltaFiles(states, [parent, parent])
    entries = [cycle_pb2.Submission(miner=f"U{i}") for i in range(2)]
    routed, strength = {1: np.array([[30.0, 10], [10, 30]])}, {1: np.array([[1.0, 0.5], [0.25, 1.0]])}
    inputs = MergeInputs(
        parent, None, entries, deltas, [1.0, 3.0], [0, 0], gram_matrix(deltas), routed, strength, {1: np.ones(2)}
    )
    attempt = Attempt(cycle_pb2.GATE_DECISION_TOP_1, (1,))
    policy = run_pb2.MergePolicy(aggregator="mean", outer_learning_rate=0.7, outer_momentum=0.9, weighting="tokens")
    assert write_candidate(attempt, inputs, policy, tmp_path / "out", tmp_path / "speed").weights == {"U1": 1.0}
    assert read_tensors(tmp_path / "out")[0][NAMES[0]][:, 0].tolist() == [1.5, 3.0]
    assert read_tensors(tmp_path / "speed")[0][NAMES[0]][:, 0].tolist() == [-0.5, -2.0]


def _file(path: Path, rows: np.ndarray) -> Path:
    with TensorWriter(path, {NAMES[0]: ("F32", rows.shape)}, {}) as writer:
        writer.write(NAMES[0], rows)
    return path


def test_a_candidate_is_built_from_claims_and_without_any_as_before(tmp_path: Path) -> None:
    parent = _file(tmp_path / "parent", np.zeros((2, 4), np.float32))
    states = [_file(tmp_path / f"s{i}", np.full((2, 4), float(i + 1), np.float32)) for i in range(2)]
    deltas = DeltaFiles(states, [parent, parent])
    entries = [cycle_pb2.Submission(miner=f"U{i}") for i in range(2)]
    policy = run_pb2.MergePolicy(aggregator="mean", outer_learning_rate=1.0, weighting="tokens")
    attempt = Attempt(cycle_pb2.GATE_DECISION_ACCEPTED, (0, 1))

    def result(routed: Mapping[int, np.ndarray]) -> tuple[list[float], dict[str, float]]:
        inputs = MergeInputs(parent, None, entries, deltas, [1.0, 1.0], [0, 0], gram_matrix(deltas), routed)
        weights = write_candidate(attempt, inputs, policy, tmp_path / "out", tmp_path / "speed").weights
        return read_tensors(tmp_path / "out")[0][NAMES[0]][:, 0].tolist(), weights

    assert result({1: np.array([[30.0, 0.0], [10.0, 0.0]])}) == ([1.25, 0.0], {"U0": 0.75, "U1": 0.25})
    assert result({}) == ([1.5, 1.5], {"U0": 0.5, "U1": 0.5})
    assert result({1: np.zeros((2, 2))}) == ([1.5, 1.5], {"U0": 0.5, "U1": 0.5})
