"""Experts grouped by what they changed, and one trained for each group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from connito.errors import Invalid
from connito.experts.compose import Part, Recipe, layers_of, merge, state_of
from connito.experts.mbc import cluster, similarity, train_cluster
from connito.experts.measure import loss
from connito.moe.rows import write_rows

from tests.support.models import Sequences


def test_similarities_are_cosines_of_the_larger_halves(parts: dict[str, Part], base: Any) -> None:
    """The published embedding at full rank: quantile, cut, cosine, written out over whole vectors."""
    shelf, keys = list(parts.values()), sorted(base)
    vectors = []
    for part in shelf:
        own = np.concatenate([(part.rows[k] - base[k]).double().numpy().ravel() for k in keys if k in part.rows])
        limit = np.quantile(np.abs(own), 0.5)
        whole = np.concatenate(
            [
                (part.rows[k] - base[k]).double().numpy().ravel() if k in part.rows else np.zeros(base[k].numel())
                for k in keys
            ]
        )
        vectors.append(np.where(np.abs(whole) > limit, whole, 0.0))
    table = np.stack(vectors) / np.linalg.norm(np.stack(vectors), axis=1, keepdims=True)
    np.testing.assert_allclose(similarity(shelf, base), table @ table.T, atol=1e-6)


def test_clusters_are_the_groups_with_the_least_spread_of_all(parts: dict[str, Part], base: Any) -> None:
    near = {key: base[key] + 0.9 * (row - base[key]) for key, row in parts["recipes"].rows.items()}
    shelf = [parts["recipes"], parts["logs"], Part("near", "8" * 64, near), parts["poems"]]
    points = similarity(shelf, base)
    assert points[0, 2] == pytest.approx(1, abs=1e-4)
    assert points[0, 3] == 0  # no row in common
    for count in (2, 3):
        labels = [tuple(int(x) for x in np.unravel_index(n, (count,) * 4)) for n in range(count**4)]
        spreads = {}
        for label in labels:
            groups = [np.flatnonzero(np.array(label) == g) for g in range(count)]
            if all(len(group) for group in groups):
                spread = sum(float(((points[g] - points[g].mean(axis=0)) ** 2).sum()) for g in groups)
                spreads[tuple(sorted(tuple(int(i) for i in g) for g in groups))] = spread
        best = min(spreads, key=spreads.__getitem__)
        assert cluster(shelf, base, count) == [list(group) for group in best]
    assert cluster(shelf, base, 4) == [[0], [1], [2], [3]]
    with pytest.raises(Invalid):
        cluster(shelf, base, 5)


@pytest.mark.slow
def test_an_expert_trained_for_its_group_beats_the_mean_of_its_members(
    full: Any, base: Any, parts: dict[str, Part], sequences: Sequences
) -> None:
    members = [parts["recipes"], parts["logs"]]
    rows = train_cluster(full, members, [sequences(d, 96, 50) for d in ("recipes", "logs")], 24, rate=2e-3)
    merged = merge(members, base, Recipe("linear"))
    assert rows.keys() == merged.keys()
    held = np.concatenate([sequences(d, 8, 90) for d in ("recipes", "logs")])
    losses = []
    for table in (merged, rows):
        write_rows(full, layers_of(table), state_of(table))
        losses.append(loss(full, held))
    assert losses[1] < losses[0]
    assert all(torch.isfinite(row).all() for row in rows.values())
