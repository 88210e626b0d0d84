"""Learned weights, upgrades of one expert, and predictions of what an expert would save."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from connito.errors import Invalid
from connito.experts.compose import Part, Recipe, layers_of, merge, state_of
from connito.experts.lorahub import learn_weights
from connito.experts.predict import measure_savings, predict_savings
from connito.experts.replacement import replace_expert
from connito.moe.evaluate import Evaluator
from connito.moe.rows import fingerprint

from tests.support.models import Sequences


def test_weights_of_a_known_bowl_are_found() -> None:
    def bowl(weights: dict[str, float]) -> float:
        return (weights["a"] - 0.7) ** 2 + (weights["b"] + 0.3) ** 2

    learned = learn_weights(["a", "b"], bowl, budget=120, l1=0.0)
    assert learned.weights == pytest.approx({"a": 0.7, "b": -0.3}, abs=0.01)
    assert learned.evaluations <= 125
    with pytest.raises(Invalid):
        learn_weights([], bowl)


@pytest.mark.parametrize("count", [2, 8, 20])
@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_of_a_synthetic_loss_is_found_without_gradients(count: int, seed: int) -> None:
    """A bowl with its optimum inside the bounds, its axes mixed: at least 95 % of what can be saved is, of 20 experts too."""
    rng = np.random.default_rng(seed)
    best, mixed = rng.uniform(-1, 1, count), rng.normal(size=(count, count))
    shape = mixed @ mixed.T / count + 0.3 * np.eye(count)
    names = [f"expert-{n}" for n in range(count)]

    def bowl(weights: dict[str, float]) -> float:
        away = np.array([weights[name] for name in names]) - best
        return float(away @ shape @ away)

    learned = learn_weights(names, bowl, l1=0.0)
    assert learned.loss < 0.05 * min(learned.losses.values())
    assert learned.evaluations <= 2 + count + max(60, 8 * count)


def test_the_objective_is_the_loss_and_the_published_penalty() -> None:
    """l1 · mean |w|: with a flat loss nothing is mixed in; with a slope of one expert the penalty decides whether it is."""
    assert set(learn_weights(["a", "b"], lambda _: 1.0, l1=0.05).weights.values()) == {0.0}
    slope = learn_weights(["a", "b"], lambda w: 1 - 0.04 * w["a"], l1=0.05).weights
    assert slope["a"] > 1.0
    flat = learn_weights(["a", "b"], lambda w: 1 - 0.01 * w["a"], l1=0.05).weights
    assert flat["a"] == pytest.approx(0.0, abs=0.01)


def test_learned_weights_are_never_worse_than_the_best_start(
    full: Any, parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor], sequences: Sequences
) -> None:
    examples = sequences("recipes", 4, 70)
    evaluator = Evaluator(full, layers_of(base))

    def loss(weights: dict[str, float]) -> float:
        rows = merge(list(parts.values()), base, Recipe("sum"), weights)
        sums, tokens = evaluator.losses(state_of(rows), examples)
        return float(sums.sum() / tokens.sum())

    learned = learn_weights(list(parts), loss, budget=12, l1=0.0)
    assert learned.loss <= min(learned.losses.values())
    assert learned.losses["recipes"] < learned.losses["base"]


def test_the_expert_of_the_texts_own_domain_ranks_first_predicted_and_measured(
    full: Any, parts: dict[str, Part], sequences: Sequences
) -> None:
    before = fingerprint(full)
    for domain in parts:
        texts = sequences(domain, 12, 80)
        predicted = predict_savings(full, list(parts.values()), texts)
        measured = measure_savings(full, parts.values(), texts)
        assert max(predicted, key=predicted.__getitem__) == domain
        assert max(measured, key=measured.__getitem__) == domain
        assert measured[domain] > 0
    assert fingerprint(full) == before
    assert not any(parameter.requires_grad for parameter in full.parameters())


def test_small_steps_save_what_is_predicted(
    full: Any, parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor], sequences: Sequences
) -> None:
    """The prediction is the first-order term: for a hundredth of δ it is nearly all there is."""
    part, texts = parts["recipes"], sequences("recipes", 6, 80)
    small = Part("small", "0", {key: base[key] + 0.01 * (row - base[key]) for key, row in part.rows.items()})
    predicted = predict_savings(full, [small], texts)["small"]
    assert measure_savings(full, [small], texts)["small"] == pytest.approx(predicted, rel=0.1)


def test_an_upgrade_changes_one_expert_and_nothing_else(
    full: Any, parts: dict[str, Part], sequences: Sequences
) -> None:
    tables = {domain: sequences(domain, 4, 90) for domain in ("recipes", "poems")}
    digests = fingerprint(full)
    done = replace_expert(full, parts["poems"], "poems", tables, margin=0.05)
    after = fingerprint(full)
    assert done.after["poems"] < done.before["poems"]
    assert sorted(name for name in after if after[name] != digests[name]) == done.changed
    assert len(done.changed) == len(parts["poems"].rows)


def test_an_upgrade_that_hurts_is_undone(
    full: Any, parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor], sequences: Sequences
) -> None:
    tables = {domain: sequences(domain, 4, 90) for domain in ("recipes", "poems")}
    digests = fingerprint(full)
    backwards = {key: base[key] - 3 * (row - base[key]) for key, row in parts["poems"].rows.items()}
    with pytest.raises(Invalid, match="this is no upgrade"):
        replace_expert(full, Part("backwards", "0", backwards), "poems", tables)
    with pytest.raises(Invalid, match="costs recipes"):
        replace_expert(full, parts["poems"], "poems", tables, margin=-10.0)
    assert fingerprint(full) == digests
