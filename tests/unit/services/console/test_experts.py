"""The library's pages: who sees which expert, what a search finds, and what came from what."""

from __future__ import annotations

from typing import cast

import pytest
from connito.library.schema import ExpertRecord
from connito.library.scores import benchmark_key
from connito.v1 import run_pb2
from connito.wire.facts import RunFacts
from connito.wire.roster import Roster
from connito.wire.subjects import LIBRARY

from services.console import charts
from services.console.cards import effects
from services.console.experts import Wanted, comparison, expert_rows, family, matching, seen_by, wanted_next
from tests.support.run import RUN, Run, theta

from .world import a_run, end

ME = "UME"
ROSTER = Roster({"operator": frozenset({"UOPERATOR"})}, organisations={"lab": frozenset({"UCOLLEAGUE"})})


def library(*made: tuple[str, tuple[str, ...], dict[str, str]]) -> dict[str, RunFacts]:
    """A finished run with its expert, and what customers made of it: id, parents, whom it is shown to."""
    story, shelf = a_run(), Run("", LIBRARY, now=2_000_000, step_ms=1000)
    end(story)
    for expert, parents, rules in made:
        shelf.say(
            "library", 0, "deposited", expert_id=expert, domain="medical", expert=theta(2, 99), parents=parents, **rules
        )
    return {RUN: story.facts, LIBRARY: shelf.facts}


def say(runs: dict[str, RunFacts], subject: str, kind: run_pb2.NoticeKind.ValueType) -> None:
    more = Run("", LIBRARY, now=3_000_000 + len(runs[LIBRARY].facts))
    more.facts, more.sequences = runs[LIBRARY], {"LIBRARY": 50 + len(runs[LIBRARY].facts)}
    more.say(
        "library",
        0,
        "notice",
        id=f"{subject}-{kind}-{len(more.facts.facts)}",
        subject=subject,
        kind=kind,
        reason="a leak",
    )


def ids(runs: dict[str, RunFacts], key: str = ME, wanted: Wanted = Wanted()) -> list[str]:  # noqa: B008 - frozen
    return [row.expert_id for row in matching(expert_rows(runs, seen_by(key, ROSTER)), wanted)]


def test_every_word_of_a_search_is_somewhere_in_the_row() -> None:
    runs = library()
    assert ids(runs, wanted=Wanted("MEDICAL tiny")) == ["medical-1"]
    assert ids(runs, wanted=Wanted("medical legal")) == []
    assert ids(runs, wanted=Wanted(domain="medical", base="tiny")) == ["medical-1"]
    assert ids(runs, wanted=Wanted(domain="legal")) == []
    (row,) = expert_rows(runs, seen_by(ME, ROSTER))
    assert row.size == "2.05 kB"
    assert row.target is not None
    assert row.target.points == ((0, 2.0), (1, 1.9))
    assert comparison([row]) == ["medical", "code"]
    assert row.curve("legal") is None


@pytest.mark.parametrize(
    ("rules", "seers"),
    [
        ({"visibility": "private", "owner": ME}, {ME, "UOPERATOR"}),
        ({"visibility": "organisation", "organisation": "lab", "owner": ME}, {ME, "UCOLLEAGUE", "UOPERATOR"}),
        ({"visibility": "public", "owner": ME}, {ME, "UCOLLEAGUE", "UOPERATOR", "USTRANGER"}),
        ({}, {"UOPERATOR"}),
    ],
)
def test_what_a_customer_made_is_shown_to_whom_its_deposit_says(rules: dict[str, str], seers: set[str]) -> None:
    runs = library(("mine", ("medical-1",), rules))
    assert {key for key in (ME, "UCOLLEAGUE", "UOPERATOR", "USTRANGER") if "mine" in ids(runs, key)} == seers


def test_what_was_yanked_is_found_by_no_search_and_listed_with_its_standing() -> None:
    runs = library(("mix", ("medical-1",), {"visibility": "public"}))
    say(runs, "mix", run_pb2.NOTICE_KIND_YANKED)
    assert ids(runs) == ["mix", "medical-1"]
    assert ids(runs, wanted=Wanted("medical")) == ids(runs, wanted=Wanted(domain="medical")) == ["medical-1"]
    assert ids(runs, wanted=Wanted("medical", everything=True)) == ["mix", "medical-1"]
    row = expert_rows(runs, seen_by(ME, ROSTER))[0]
    assert (row.withdrawn, row.notice) == (True, "yanked: a leak")
    say(runs, "mix", run_pb2.NOTICE_KIND_RESTORED)
    assert "mix" in ids(runs, wanted=Wanted("medical"))
    say(runs, "mix", run_pb2.NOTICE_KIND_DEPRECATED)
    assert "mix" in ids(runs, wanted=Wanted("medical")), "a deprecated one is found, with its standing"


def test_a_source_that_opted_out_takes_what_was_made_of_it_along() -> None:
    runs = library(
        ("mix", ("medical-1",), {"visibility": "public"}), ("mixed-again", ("mix",), {"visibility": "public"})
    )
    runs[RUN].require_spec().data_sources.append("ward-notes")
    say(runs, "ward-notes", run_pb2.NOTICE_KIND_OPTED_OUT)
    assert [row.withdrawn for row in expert_rows(runs, seen_by(ME, ROSTER))] == [True, True, True]
    assert ids(runs, wanted=Wanted("medical")) == []


@pytest.mark.parametrize(("notice", "shown"), [(False, "quiz acc 0.100 → 0.900 (2 items)"), (True, "")])
def test_the_scores_of_a_row_are_those_of_its_record(notice: bool, shown: str) -> None:
    """What comes after a notice that there will be none is on no record."""
    runs = library()
    runs[RUN].require_spec().tasks.add(domain="quiz")
    late = Run(now=3_000_000, step_ms=1)
    late.facts, late.sequences = runs[RUN], {"LIBRARY": 90, "RUNS": 90}
    if notice:
        late.say("run", 0, "paused", key="UL", service="library", action=benchmark_key(RUN), detail="late")
    score = run_pb2.BenchmarkScore(name="quiz", metric="acc", items=2, before=0.1, after=0.9)
    late.publish("library", 0, "benchmarked", run_pb2.BenchmarksMeasured(run=RUN, scores=[score]), "", "aggregator")
    assert [row.scores for row in expert_rows(runs, seen_by(ME, ROSTER))] == [shown]


def test_relatives_are_those_that_may_be_seen() -> None:
    hidden = {"visibility": "private", "owner": "UOTHER"}
    runs = library(("mix", ("medical-1",), {"visibility": "public"}), ("secret", ("medical-1",), hidden))
    rows = expert_rows(runs, seen_by(ME, ROSTER))
    made = {row.expert_id: family(row, rows) for row in rows}
    assert (made["medical-1"].parents, made["medical-1"].children) == ((), ("mix",))
    assert made["mix"].parents == ("medical-1",)
    assert "secret" not in str(charts.lineage("medical-1", (), made["medical-1"].children))


def test_demand_counts_no_run_that_may_not_be_seen() -> None:
    assert [row.domain for row in wanted_next(library(), seen_by(ME, ROSTER))] == ["medical"]
    private = Run("tax").created(visibility="private", customer="UOTHER").facts
    assert wanted_next({RUN: private}, seen_by(ME, ROSTER)) == []


def test_an_effect_has_its_interval() -> None:
    losses = [
        {"domain": "code", "before": 3.0, "after": 3.01, "tokens": 10, "change_low": -0.01, "change_high": 0.03},
        {"domain": "law", "before": 2.0, "after": 1.5, "tokens": 100, "change_low": -0.6, "change_high": -0.4},
        {"domain": "old", "before": None, "after": 1.5, "tokens": 100},
    ]
    found = effects(cast(ExpertRecord, {"domain": "law", "losses": losses}))
    assert [(one.domain, round(one.change, 2), one.own) for one in found] == [
        ("law", -0.5, True),
        ("code", 0.01, False),
    ]
    drawn = str(charts.effects(found))
    assert 'class="interval good"' in drawn
    assert 'class="interval unsure"' in drawn
    assert effects(None) == []
