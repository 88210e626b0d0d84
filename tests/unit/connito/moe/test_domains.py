"""Budgets, and several domains selected together."""

from __future__ import annotations

import numpy as np
import pytest
from connito.errors import Invalid
from connito.moe.budget import Budget, Cost, of_base
from connito.moe.selection import Selection, select_experts
from connito.moe.statistics import RoutingStatistics


def statistics(*layers: list[int], num_experts: int = 4) -> RoutingStatistics:
    """Top-1 routing: how many tokens went to each expert."""
    out = RoutingStatistics()
    for index, counts in enumerate(layers):
        ids = np.repeat(np.arange(len(counts)), counts)[:, None]
        out.add(index, num_experts, ids, np.ones(ids.shape))
    return out


SURGERY = statistics([6, 4, 0, 0], [5, 5, 0, 0])
NURSING = statistics([0, 7, 3, 0], [0, 0, 4, 6])


def both(rule: str = "share", **options: object) -> Selection:
    return select_experts(
        SURGERY,
        "esft-token",
        1.0,
        domain="surgery",
        beside={"nursing": NURSING},
        contested=rule,
        **options,  # type: ignore[arg-type]
    )


def test_what_one_domain_chose_is_its_own_and_what_both_chose_is_shared() -> None:
    chosen = both()
    assert chosen.layers == {0: [1, 0, 2], 1: [3, 0, 1, 2]}
    assert chosen.domains == {"surgery": {0: [0, 1], 1: [0, 1]}, "nursing": {0: [1, 2], 1: [3, 2]}}
    assert chosen.shared == {0: [1]}
    assert chosen.scores[0] == [0.6, 0.7, 0.3, 0.0]
    (conflict,) = chosen.diagnostics["conflicts"]
    assert conflict == {
        "layer": 0,
        "expert": 1,
        "scores": {"surgery": 0.4, "nursing": 0.7},
        "to": ["surgery", "nursing"],
    }
    assert chosen.diagnostics["overlap"]["surgery|nursing"] == pytest.approx(0.2)
    assert Selection.from_json(chosen.to_json()) == chosen


def test_an_exclusive_expert_goes_to_who_leans_on_it_most() -> None:
    chosen = both("exclusive")
    assert chosen.domains["surgery"][0] == [0]
    assert chosen.domains["nursing"][0] == [1, 2]
    assert chosen.shared == {}
    assert chosen.diagnostics["conflicts"][0]["to"] == ["nursing"]


def test_a_shared_expert_costs_its_bytes_once_and_a_duplicate_twice() -> None:
    assert both(budget=Budget(3)).layers == {0: [1, 0], 1: [3]}
    twice = both("duplicate", budget=Budget(4))
    assert {name: sum(map(len, found.values())) for name, found in twice.domains.items()} == {
        "surgery": 2,
        "nursing": 2,
    }
    assert twice.domains == {"surgery": {0: [0], 1: [0]}, "nursing": {0: [1], 1: [3]}}
    with pytest.raises(Invalid, match="leaves nothing for each"):
        both("duplicate", budget=Budget(1))


def test_a_single_domain_says_nothing_about_sharing() -> None:
    document = select_experts(SURGERY, "esft-token", 1.0).to_json()
    assert not {"domains", "shared"} & document.keys()


def test_the_running_mean_of_des_moe_remembers_earlier_rounds() -> None:
    earlier = statistics([0, 0, 0, 10], [0, 0, 0, 10])
    assert select_experts(SURGERY, "des-moe", 0.6).layers == {0: [0, 1], 1: [0, 1]}
    # 0.9·1 + 0.1·0 for expert 3, and 0.06 at most for the others.
    assert select_experts(SURGERY, "des-moe", 0.6, earlier=[earlier]).layers == {0: [3], 1: [3]}
    with pytest.raises(Invalid, match="only des-moe"):
        select_experts(SURGERY, earlier=[earlier])


def test_caps_hold_for_each_layer_or_over_all() -> None:
    costs = {0: Cost(100, 500), 1: Cost(100, 500)}
    assert select_experts(SURGERY, "esft-token", 1.0, budget=Budget(experts=1)).layers == {0: [0]}
    assert select_experts(SURGERY, "esft-token", 1.0, budget=Budget(experts=1, scope="layer")).layers == {
        0: [0],
        1: [0],
    }
    per_layer = Budget(size=150, scope="layer", costs=costs)
    assert select_experts(SURGERY, "esft-token", 1.0, budget=per_layer).layers == {0: [0], 1: [0]}
    # Memory has no layers: two experts fit beside what is resident, one a layer.
    memory = Budget(memory=2050, costs=costs, resident=1000)
    assert select_experts(SURGERY, "esft-token", 1.0, budget=memory).layers == {0: [0], 1: [0]}


def test_memory_counts_rows_gradients_moments_and_what_stays() -> None:
    costs, resident = of_base({0: 200}, 5000, {0: 8}, value_bytes=2, helpers_per_layer=2)
    assert costs == {0: Cost(200, 2 * 200 + 100 * 8)}
    assert resident == 5000 - 6 * 200


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (Budget(size=99, costs={0: Cost(100, 500)}), "too small for one expert, which takes 100"),
        (Budget(memory=1400, costs={0: Cost(100, 500)}, resident=1000), "needs 1500 in all: raise --max-vram"),
        (Budget(experts=1, scope="galaxy"), "global or layer"),
        (Budget(experts=-1), "below zero"),
        (Budget(memory=10), "needs the size of an expert"),
    ],
)
def test_budgets_that_nothing_fits_are_refused(budget: Budget, says: str) -> None:
    with pytest.raises(Invalid, match=says):
        select_experts(SURGERY, "esft-token", 1.0, budget=budget)


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(Invalid, match="share, duplicate, exclusive"):
        both("lottery")
