"""The search for the experts that a layer keeps: brute force where it can be, a known optimum where it cannot."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.experts.choose import choose, deal
from connito.experts.genetic import CANDIDATES, fittest, receptive
from connito.experts.prune import masked

from tests.support.models import Sequences


@pytest.fixture(scope="session")
def tiny(distinct_tiny: Path) -> Path:
    """Experts that differ, so that it matters which are left out."""
    return distinct_tiny


def knapsack(seed: int, total: int) -> Callable[[list[int]], float]:
    """An error with pairs in it, that no expert by itself explains."""
    rng = np.random.default_rng(seed)
    own, pairs = rng.random(total), 0.3 * rng.random((total, total))

    def error(keep: list[int]) -> float:
        gone = [e for e in range(total) if e not in keep]
        return float(own[gone].sum()) + float(pairs[np.ix_(gone, gone)].sum())

    return error


def test_few_sets_are_all_tried() -> None:
    error = knapsack(0, 8)
    best = sorted(combinations(range(8), 3), key=lambda keep: error(list(keep)))
    assert fittest(8, 3, error) == best[:CANDIDATES]


@pytest.mark.parametrize("seed", range(4))
def test_of_ten_million_sets_the_search_finds_a_better_one_than_dropping_one_at_a_time(seed: int) -> None:
    error, calls = knapsack(seed, 24), []

    def counted(keep: list[int]) -> float:
        calls.append(1)
        return error(keep)

    greedy = list(range(24))
    while len(greedy) > 14:
        greedy.remove(min(greedy, key=lambda e: error([x for x in greedy if x != e])))
    found = fittest(24, 14, counted, seed=seed)
    assert len(found[0]) == 14
    assert len(calls) < 1000
    assert error(list(found[0])) <= 1.05 * error(greedy)
    assert found == fittest(24, 14, error, seed=seed)
    drawn = [error(sorted(np.random.default_rng(n).choice(24, 14, replace=False).tolist())) for n in range(1000)]
    assert error(list(found[0])) < min(drawn)


def test_neighbouring_layers_are_chosen_together(full: Any, sequences: Sequences) -> None:
    """Every combination, and the distance of what leaves the last layer: written out."""
    text = sequences("recipes", 2, 60)[:, :-1]
    candidates = {2: [(0, 1, 2), (3, 4, 5), (2, 6, 7)], 3: [(0, 3, 6), (1, 2, 4), (5, 6, 7)]}
    ids = torch.from_numpy(text.astype("int64"))

    def behind() -> torch.Tensor:
        with torch.no_grad():
            states = full.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        # The last is after the final norm; what enters it is what leaves layer 3.
        seen: list[torch.Tensor] = []
        handle = full.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            full.model(input_ids=ids, use_cache=False)
        handle.remove()
        assert len(states) == 5
        return seen[0].double()

    wanted, errors = behind(), {}
    for sets in product(*candidates.values()):
        with masked(full, {2: list(sets[0]), 3: list(sets[1])}):
            errors[sets] = float((behind() - wanted).norm())
    best = min(errors, key=errors.__getitem__)
    assert receptive(full, text, candidates) == {2: list(best[0]), 3: list(best[1])}


def test_places_follow_what_a_lost_expert_costs(full: Any, sequences: Sequences) -> None:
    assert deal({2: 3.0, 3: 1.0}, {2: 8, 3: 8}, 8) == {2: 6, 3: 2}
    keep = choose(full, sequences("recipes", 2, 60), "moe-i2", max_experts=6)
    assert sum(map(len, keep.values())) == 6
