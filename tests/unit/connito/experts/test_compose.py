"""What composition must keep: single experts exactly, the base exactly, and no dependence on order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.experts.compose import Composition, Part, Recipe, conflicts, layers_of, merge, rows_of, state_of
from connito.library.artifact import ExpertHeader
from connito.moe.rows import base_digests, fingerprint, read_rows, write_rows

RECIPES = [Recipe("linear"), Recipe("sum"), Recipe("ties"), Recipe("ties", density=0.3, scale=0.8)]


def same(one: Mapping[Any, torch.Tensor], other: Mapping[Any, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_rows_and_states_are_inverses(parts: dict[str, Part]) -> None:
    rows = parts["recipes"].rows
    assert same(rows_of(layers_of(rows), state_of(rows)), rows)


@pytest.mark.parametrize("recipe", RECIPES[:3], ids=str)
def test_one_expert_comes_back_bit_for_bit(
    parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor], recipe: Recipe
) -> None:
    assert same(merge([parts["recipes"]], base, recipe), parts["recipes"].rows)


@pytest.mark.parametrize("method", ["linear", "sum", "ties"])
def test_one_hot_weights_reproduce_the_single_expert(
    parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor], method: str
) -> None:
    weights = {"recipes": 1.0, "logs": 0.0, "poems": 0.0}
    merged = merge(list(parts.values()), base, Recipe(method), weights)
    for key, row in merged.items():
        assert torch.equal(row, parts["recipes"].rows.get(key, base[key]))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_the_order_of_experts_makes_no_difference(
    parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor], recipe: Recipe
) -> None:
    results = [merge(list(order), base, recipe) for order in itertools.permutations(parts.values())]
    assert all(same(results[0], other) for other in results[1:])


def test_rows_of_one_expert_alone_stay_its_own(
    parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor]
) -> None:
    merged = merge(list(parts.values()), base)
    assert all(torch.equal(merged[key], row) for key, row in parts["poems"].rows.items())


def test_linear_is_the_weighted_mean_of_those_that_touch_a_row(
    parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor]
) -> None:
    key = (2, 1, "down_proj")
    merged = merge([parts["recipes"], parts["logs"]], base, Recipe("linear"), {"recipes": 3.0, "logs": 1.0})
    wanted = 0.75 * parts["recipes"].rows[key] + 0.25 * parts["logs"].rows[key]
    torch.testing.assert_close(merged[key], wanted, rtol=1e-5, atol=1e-7)


def test_ties_on_numbers_worked_by_hand() -> None:
    key, zero = (0, 0, "down_proj"), {(0, 0, "down_proj"): torch.zeros(4)}
    one = Part("one", "1" * 64, {key: torch.tensor([4.0, -3.0, 1.0, 0.5])})
    two = Part("two", "2" * 64, {key: torch.tensor([2.0, 5.0, -4.0, 0.25])})
    # Whole: signs +, +, −, +; only those that agree are averaged.
    assert merge([one, two], zero, Recipe("ties"))[key].tolist() == [3.0, 5.0, -4.0, 0.375]
    # Half: one keeps 4 and −3, two keeps 5 and −4.
    assert merge([one, two], zero, Recipe("ties", density=0.5))[key].tolist() == [4.0, 5.0, -4.0, 0.0]
    assert merge([one, two], zero, Recipe("ties", density=0.5, scale=0.5))[key].tolist() == [2.0, 2.5, -2.0, 0.0]


def test_conflicts_are_reported_per_shared_expert(
    parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor]
) -> None:
    found = conflicts(list(parts.values()), base)
    assert [(c.layer, c.expert, c.names) for c in found] == [
        (2, 1, ("recipes", "logs")),
        (2, 2, ("recipes", "logs")),
        (3, 4, ("recipes", "logs")),
    ]
    assert all(-1 <= c.cosine <= 1 and 0 <= c.sign_agreement <= 1 for c in found)
    twin = Part("twin", "9" * 64, parts["recipes"].rows)
    assert all(
        c.cosine == pytest.approx(1) and c.sign_agreement == 1 for c in conflicts([parts["recipes"], twin], base)
    )


def test_what_cannot_be_merged_is_refused(
    parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor]
) -> None:
    with pytest.raises(Invalid, match="unknown merge method"):
        Recipe("blend")
    with pytest.raises(Invalid, match="density"):
        Recipe("ties", density=0.0)
    with pytest.raises(Invalid, match="each expert once"):
        merge([parts["logs"], parts["logs"]], base)
    with pytest.raises(Invalid, match="each expert once"):
        merge([], base)
    with pytest.raises(Invalid, match="another base"):
        merge([parts["logs"]], {})
    with pytest.raises(Invalid, match="sum to 0"):
        merge([parts["recipes"], parts["logs"]], base, Recipe("linear"), {"recipes": 1.0, "logs": -1.0})


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_adding_and_removing_in_any_order_leaves_the_base_bit_for_bit(
    full: Any, parts: dict[str, Part], recipe: Recipe
) -> None:
    before = fingerprint(full)
    composition = Composition(full, recipe)
    for name in ("recipes", "logs", "poems"):
        composition.add(parts[name])
    changed = composition.verify()
    assert len(changed) == len({key for part in parts.values() for key in part.rows})
    for name in ("logs", "recipes", "poems"):
        composition.remove(name)
    assert fingerprint(full) == before
    assert composition.verify() == []


def test_the_model_depends_on_the_set_of_experts_alone(full: Any, tiny: Path, parts: dict[str, Part]) -> None:
    from connito.base.loading import load_full

    one, other = Composition(full), Composition(load_full(tiny))
    for name in ("recipes", "poems"):
        one.add(parts[name])
    for name in ("poems", "logs", "recipes"):
        other.add(parts[name])
    other.remove("logs")
    assert fingerprint(one.model) == fingerprint(other.model)


def test_adding_reports_conflicts_and_refuses_strangers(full: Any, parts: dict[str, Part]) -> None:
    composition = Composition(full)
    assert composition.add(parts["recipes"]) == []
    assert {c.expert for c in composition.add(parts["logs"])} == {1, 2, 4}
    with pytest.raises(Invalid, match="already"):
        composition.add(parts["logs"])
    with pytest.raises(NotFound):
        composition.remove("poems")
    with torch.no_grad():
        full.lm_head.weight[0, 0] += 1
    with pytest.raises(VerificationFailed, match="outside the composed experts"):
        composition.verify()


def test_an_expert_of_another_base_is_refused_before_any_write(full: Any, parts: dict[str, Part]) -> None:
    layers = layers_of(parts["poems"].rows)
    good = base_digests(full, layers)
    composition = Composition(full)
    before = fingerprint(full)

    def with_header(rest: str) -> Part:
        header = ExpertHeader("poems", "tiny", "b" * 64, layers, "r", 1, rest, good.rows)
        return Part("poems", "p", parts["poems"].rows, header)

    with pytest.raises(Invalid, match="not tiny, the base"):
        composition.add(with_header("0" * 64))
    assert fingerprint(full) == before
    composition.add(parts["recipes"])  # the base's digests are those from before any expert went in
    composition.add(with_header(good.rest))


def test_writing_a_merge_by_hand_equals_the_composition(
    full: Any, tiny: Path, parts: dict[str, Part], base: dict[tuple[int, int, str], torch.Tensor]
) -> None:
    from connito.base.loading import load_full

    merged = merge(list(parts.values()), base)
    other = load_full(tiny)
    write_rows(other, layers_of(merged), state_of(merged))
    composition = Composition(full)
    for part in parts.values():
        composition.add(part)
    assert same(read_rows(full, layers_of(merged)), read_rows(other, layers_of(merged)))
