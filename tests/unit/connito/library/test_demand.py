from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from connito.curation import need
from connito.curation.holdings import Holdings
from connito.errors import Invalid
from connito.library.searches import recall, remember
from connito.library.shelf import Shelf
from connito.library.training_demand import Demand, Search, Training, decay, demand, series, training_of_record

LAW = Training("law", "b", (0.4, 0.2, 0.1), 1, "law-1")
POEMS = Training("poems", "b", (0.1, 0.05), 2, "poems-1")


def rows(*args: Any, **kwargs: Any) -> dict[str, Demand]:
    return {row.domain: row for row in demand(*args, **kwargs)}


def test_the_gain_of_further_cycles_shrinks_by_the_ratio_seen_so_far() -> None:
    found = rows([LAW, POEMS], {}, [], cycles=2)

    assert decay([LAW, POEMS]) == pytest.approx(0.5)
    assert found["law"].expected == pytest.approx(0.1 * (0.5 + 0.25))
    assert found["law"].saved == pytest.approx(0.7)
    assert found["poems"].expected == pytest.approx(0.05 * 0.75)
    assert list(found) == ["law", "poems"]


def test_interest_can_put_another_domain_first() -> None:
    found = demand([LAW, POEMS], {"poems": 5}, [Search("poems", 0)], cycles=2)

    assert [row.domain for row in found] == ["poems", "law"]
    assert found[0].interest == 7
    assert found[0].score == pytest.approx(7 * 0.05 * 0.75)


def test_a_domain_that_was_only_searched_for_is_expected_to_be_like_the_others() -> None:
    found = rows([LAW, POEMS], {}, [Search("stars", 0), Search("stars", 3, 0.2)], cycles=1)

    assert (found["stars"].searches, found["stars"].misses) == (2, 1)
    assert found["stars"].expected == pytest.approx(0.25)
    assert found["stars"].basis.startswith("never trained")


def test_words_that_found_an_expert_are_no_domain_that_lacks_one() -> None:
    found = rows([LAW], {"poems": 1}, [Search("contracts", 2), Search("(by example)", 1, 0.3), Search("law", 1)])
    assert set(found) == {"law", "poems"}
    assert found["law"].searches == 1


def test_a_use_that_the_shelf_and_the_platform_wrote_down_is_one_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path)
    for name, units in (("law-1", 2), ("law-1", 3), ("poems-1", 4)):
        shelf.meter(name, "serve", "", 1, units)
    platform = Counter({"law-1": 5, "poems-1": 9})
    monkeypatch.setattr(need, "_of_platform", lambda _: ([LAW, POEMS], platform))
    monkeypatch.setattr(Holdings, "platform", lambda _: None)
    found = {row.domain: row.uses for row in need.demand(library=Holdings(tmp_path))}
    assert found == {"law": 5, "poems": 9}


def test_nothing_to_go_by_comes_last_by_interest() -> None:
    found = demand([], {}, [Search("a", 0), Search("b", 0), Search("b", 1, 0.0)])

    assert [(row.domain, row.score) for row in found] == [("b", None), ("a", None)]


def test_the_newest_run_of_a_domain_decides() -> None:
    worse = Training("law", "b", (0.01,), 9, "law-2")

    found = rows([worse, LAW], {}, [], cycles=1)

    assert found["law"].last_cycle == pytest.approx(0.01)
    assert found["law"].expert_ids == ["law-1", "law-2"]


def test_a_cycle_that_lost_promises_nothing() -> None:
    assert rows([Training("law", "b", (0.2, -0.1), 1)], {}, [], cycles=3)["law"].expected == 0.0


def test_the_series() -> None:
    assert series(0.5, 3) == pytest.approx(0.875)
    assert series(1.0, 3) == 3
    assert series(0.5, 0) == 0


def test_a_record_without_its_log_spreads_its_saving() -> None:
    record = {
        "expert_id": "law-3", "domain": "law", "base": {"manifest": "b"}, "lineage": [{}, {}],
        "losses": [{"domain": "law", "before": 3.0, "after": 2.5}],
    }  # fmt: skip

    assert training_of_record(record, 4) == Training("law", "b", (0.25, 0.25), 4, "law-3")


def test_searches_are_counted_without_keeping_texts(tmp_path: Path) -> None:
    remember(tmp_path, ["Deep", "Sea!"], "", 0, 1)
    remember(tmp_path, [], "", 2, 2, 0.3)
    with (tmp_path / "searches.jsonl").open("a") as file:
        file.write('{"cut sho')

    assert list(recall(tmp_path)) == [Search("deep sea", 0), Search("(by example)", 2, 0.3)]
    assert [search.missed for search in recall(tmp_path)] == [True, False]


@pytest.mark.parametrize("cycles", [0, -1])
def test_the_gain_of_no_further_cycle_is_not_asked_for(cycles: int) -> None:
    with pytest.raises(Invalid, match=f"cycles is {cycles}; ask for 1 or more"):
        demand([LAW], {}, [], cycles=cycles)


def test_a_domain_whose_expert_was_withdrawn_has_none() -> None:
    found = rows([LAW, POEMS], {"law": 3}, [], {"law-1"}, cycles=1)

    assert (found["law"].experts, found["law"].saved, found["law"].uses) == (0, 0.0, 3)
    assert found["law"].expected == pytest.approx(0.25)  # As of a domain that was only searched for.
    assert found["law"].basis.startswith("its expert was withdrawn")
    assert found["poems"] == rows([LAW, POEMS], {}, [], cycles=1)["poems"]
