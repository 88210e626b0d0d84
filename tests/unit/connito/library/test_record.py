from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from connito.errors import Invalid
from connito.library.card import render
from connito.library.record import build_record, encode, expert_id
from connito.library.schema import read_record
from connito.library.scores import as_messages, as_rows, line
from connito.v1 import run_pb2
from connito.wire.facts import RunFacts
from connito.wire.subjects import FactKey

Pairs = list[tuple[FactKey, Any]]
Rebuild = Callable[[Pairs], RunFacts]


def test_the_record_tells_losses_lineage_and_who_earned_what(finished: RunFacts) -> None:
    record = build_record(finished, "e" * 64, 1200, 300)

    assert record["expert_id"] == "medical-eeeeeeeeeeee"
    assert record["losses"][0] == {"domain": "medical", "before": 3.0, "after": 2.5, "tokens": 640}
    assert [row["gate"] for row in record["lineage"]] == ["accepted", "kept_incumbent"]
    assert [row["parent_state"][:1] for row in record["lineage"]] == ["0", "1"]
    shares = {row["miner"]: (row["share"], row["label"], row["reasons"]) for row in record["contributors"]}
    assert shares == {"UA": (0.6, "anna", {}), "UB": (0.4, "", {}), "UC": (0.0, "", {"copy": 2})}


def test_data_that_went_into_the_start_is_in_the_record(finished: RunFacts) -> None:
    parent = build_record(finished, "f" * 64, 1, 1)
    parent["governance"] = {"visibility": "public", "owner": "UP", "sources": ["diary"]}
    alone = build_record(finished, "e" * 64, 1, 1)["governance"]["sources"]
    started = build_record(finished, "e" * 64, 1, 1, parent=parent)["governance"]["sources"]
    assert started == sorted([*alone, "diary"])


def test_the_time_in_the_record_is_the_logs(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    one, two = (build_record(rebuild(pairs), "e" * 64, 1, 1) for _ in range(2))

    assert encode(one) == encode(two)
    assert one["created"] == "2030-03-17T17:46:40.012+00:00"


def test_what_the_whole_run_changed_has_an_interval(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    for key, message in pairs:
        if (key.section, key.kind) == ("merge", "version"):
            for loss in message.losses:
                loss.sequence_tokens.extend([10, 10, 20])
                # The second version began where the first one ended: what counts is the first's before.
                loss.before_sums.extend([30.0, 28.0, 62.0] if key.cycle == 1 else [25.0, 26.0, 49.0])
                loss.after_sums.extend([25.0, 26.0, 49.0])
    row = build_record(rebuild(pairs), "e" * 64, 1, 1)["losses"][0]
    assert row["change_low"] < (25 + 26 + 49 - 30 - 28 - 62) / 40 < row["change_high"]


def test_a_record_says_whose_it_is_and_who_sees_it(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    spec = pairs[0][1].spec
    spec.visibility, spec.organisation, spec.customer = "organisation", "clinic", "UO"
    spec.data_sources.append("atlas")
    record = build_record(rebuild(pairs), "e" * 64, 1, 1, {"layers": {}, "tokens": {}})
    assert record["governance"] == {
        "visibility": "organisation", "organisation": "clinic", "owner": "UO", "sources": ["atlas"],
    }  # fmt: skip
    assert (record["version"], record["parents"], record["signature"]) == (2, [], {"layers": {}, "tokens": {}})


def test_an_unfinished_run_has_no_record(pairs: list[tuple[Any, ...]], rebuild: Callable[..., Any]) -> None:
    with pytest.raises(Invalid, match="no finished model version"):
        build_record(rebuild(pairs[:-1]), "e" * 64, 1, 1)


def test_an_expert_id_can_stand_in_a_subject() -> None:
    assert expert_id("Français: droit", "a" * 64) == "Fran-ais-droit-aaaaaaaaaaaa"


def test_the_card_holds_text_of_the_customer_inside_its_table(finished: RunFacts) -> None:
    card = render(build_record(finished, "e" * 64, 1200, 300))

    assert "| data | definitions \\| of symptoms in one table |" in card
    assert "| medical | 3.0000 | 2.5000 | -0.5000 | 640 |" in card
    assert "| anna (UA…) | 60.0% | 1 | – |" in card
    assert "| UC… | 0.0% | 0 | copy ×2 |" in card
    assert "None" not in card


def test_scores_of_what_the_run_names_are_on_the_record_and_its_card(pairs: Pairs, rebuild: Rebuild) -> None:
    bare = build_record(rebuild(pairs), "e" * 64, 1, 1)
    assert "scores" not in bare
    assert "## Scores" not in render(bare)
    scores = [
        run_pb2.BenchmarkScore(
            name="exam", metric="loss", items=9, tokens=90, before=3.0, after=2.5, low=-0.7, high=-0.3
        ),
        run_pb2.BenchmarkScore(name="quiz", metric="acc", items=20, before=0.25, after=0.5),
    ]
    missing = [run_pb2.Unscored(name="sums", why="its answers are long")]
    key = FactKey("library", 0, "benchmarked")
    fact = run_pb2.BenchmarksMeasured(run="run-1", scores=scores, unscored=missing)

    record = build_record(rebuild([*pairs, (key, fact)]), "e" * 64, 1, 1)

    assert read_record(encode(record), "it")["scores"] == [
        {
            "name": "exam",
            "metric": "loss",
            "items": 9,
            "before": 3.0,
            "after": 2.5,
            "change_low": -0.7,
            "change_high": -0.3,
        },
        {"name": "quiz", "metric": "acc", "items": 20, "before": 0.25, "after": 0.5},
    ]
    card = render(record)
    assert "| exam | loss | 3.0000 | 2.5000 | -0.5000 | 9 | -0.7000 to -0.3000 |" in card
    assert "| quiz | acc | 0.2500 | 0.5000 | +0.2500 | 20 | – |" in card
    assert "| sums | not scored: its answers are long |" in card
    assert '{type: "acc", name: "acc", value: 0.500000}' in card
    assert line(record["scores"]) == "exam loss 3.000 → 2.500 (9 items); quiz acc 0.250 → 0.500 (20 items)"
    assert as_rows(as_messages(record)) == record["scores"]


def test_a_record_says_that_nobody_could_score(pairs: Pairs, rebuild: Rebuild) -> None:
    (_, created) = pairs[0]
    assert isinstance(created, run_pb2.RunCreated)
    created.spec.tasks.add(domain="quiz")
    notice = run_pb2.RunPaused(run="run-1", key="UG", service="aggregator", action="run-1/benchmark", detail="no room")

    record = build_record(rebuild([*pairs, (FactKey("run", 0, "paused", "UG"), notice)]), "e" * 64, 1, 1)

    assert record["unscored"] == {"quiz": "no room"}
    notice.service = "validator"
    record = build_record(rebuild([*pairs, (FactKey("run", 0, "paused", "UG"), notice)]), "e" * 64, 1, 1)
    assert "unscored" not in record, "who does not score says nothing of scores"


def test_the_first_word_on_scores_holds(pairs: Pairs, rebuild: Rebuild) -> None:
    """Library and auditor read it off the log, and agree, whichever of two services was slow."""
    (_, created) = pairs[0]
    assert isinstance(created, run_pb2.RunCreated)
    created.spec.tasks.add(domain="quiz")
    notice = run_pb2.RunPaused(run="run-1", key="UL", service="library", action="run-1/benchmark", detail="late")
    scores = [run_pb2.BenchmarkScore(name="quiz", metric="acc", items=20, before=0.25, after=0.5)]
    said: Pairs = [
        (FactKey("run", 0, "paused", "UL"), notice),
        (FactKey("library", 0, "benchmarked"), run_pb2.BenchmarksMeasured(run="run-1", scores=scores)),
    ]
    late = build_record(rebuild([*pairs, *said]), "e" * 64, 1, 1)
    assert (late.get("scores"), late["unscored"]) == (None, {"quiz": "late"})
    early = build_record(rebuild([*pairs, *reversed(said)]), "e" * 64, 1, 1)
    assert (len(early["scores"]), early.get("unscored")) == (1, None)
