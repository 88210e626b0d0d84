from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles
from connito.protocol.merging.candidates import Attempt, MergeInputs, attempts, outliers, plan_of
from connito.v1 import cycle_pb2, run_pb2

ALL = cycle_pb2.GATE_DECISION_ACCEPTED
CALM = cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS
BEST = cycle_pb2.GATE_DECISION_TOP_1
WIDE = cycle_pb2.GATE_DECISION_WITH_GAINLESS


def ingredients(
    deltas: Sequence[Sequence[float]],
    utilities: list[float],
    staleness: list[int] | None = None,
    commits: Sequence[int] | None = None,
) -> MergeInputs:
    table = np.asarray(deltas, float)
    submissions = [
        cycle_pb2.Submission(miner=f"M{i}", commit_sequence=c + 1) for i, c in enumerate(commits or range(len(deltas)))
    ]
    staleness = staleness or [0] * len(deltas)
    gram = table @ table.T if len(deltas) else np.zeros((0, 0))
    return MergeInputs(Path("p"), None, submissions, DeltaFiles([], []), utilities, staleness, gram)


def test_outliers_are_long_or_point_against_the_rest() -> None:
    deltas = np.array([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [0.9, 0.1, 0.1], [9.0, 0.5, 0.5], [-1.0, 0.0, 0.0]])

    assert outliers(deltas @ deltas.T) == [3, 4]


def test_two_that_disagree_are_both_outliers_and_one_is_none() -> None:
    assert outliers(np.array([[1.0, -1.0], [-1.0, 1.0]])) == [0, 1]
    assert outliers(np.array([[4.0]])) == []
    assert outliers(np.zeros((3, 3))) == []


def test_fallbacks_come_in_order() -> None:
    calm = ingredients([[1, 0], [1, 0.1]], [0.1, 0.2])
    wild = ingredients([[1, 0], [1, 0.1], [9, 0]], [0.1, 0.2, 0.1])
    torn = ingredients([[1, 0], [-1, 0]], [0.2, 0.1])

    assert list(attempts(calm)) == [Attempt(ALL, (0, 1)), Attempt(BEST, (1,))]
    assert list(attempts(wild)) == [Attempt(ALL, (0, 1, 2)), Attempt(CALM, (0, 1)), Attempt(BEST, (1,))]
    assert list(attempts(torn)) == [Attempt(ALL, (0, 1)), Attempt(BEST, (0,))]
    assert list(attempts(ingredients([], []))) == []


def test_what_gained_nothing_alone_is_tried_with_the_others_and_counts_in_nothing_else() -> None:
    found = replace(ingredients([[1, 0], [9, 9], [1, 0.1]], [0.1, 0.0, 0.2]), gainless=frozenset({1}))

    assert list(attempts(found)) == [Attempt(ALL, (0, 2)), Attempt(WIDE, (0, 1, 2)), Attempt(BEST, (2,))]
    how = plan_of(Attempt(WIDE, (0, 1, 2)), found, run_pb2.MergePolicy(aggregator="mean"))
    assert how.weights == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    nobody = replace(ingredients([[1, 0], [0, 1]], [0.0, 0.0]), gainless=frozenset({0, 1}))
    assert list(attempts(nobody)) == [Attempt(WIDE, (0, 1))]


def test_the_earlier_commitment_is_the_best_of_equals() -> None:
    assert ingredients([[1, 0], [0, 1]], [0.2, 0.2], commits=[5, 3]).best == 1


def test_stale_work_weighs_less() -> None:
    how = plan_of(
        Attempt(ALL, (0, 1)),
        ingredients([[1, 0], [0, 1]], [0.2, 0.2], staleness=[0, 1]),
        run_pb2.MergePolicy(aggregator="utility-mean"),
    )

    assert how.weights == pytest.approx((2 / 3, 1 / 3))


def test_the_best_alone_is_the_best_whatever_the_policy() -> None:
    how = plan_of(
        Attempt(BEST, (1,)), ingredients([[1, 0], [0, 1]], [0.1, 0.2]), run_pb2.MergePolicy(aggregator="krum")
    )

    assert how.weights == (1.0,)
