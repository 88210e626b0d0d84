"""The rates on the page of attacks are those of the published document, and thieves' works are judged as runs judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.v1 import run_pb2

from bench.attacks_page import (
    EVIDENCE,
    LIES,
    MERGE_LIES,
    PAGE,
    TRIGGERS,
    render,
    render_claims,
    render_merges,
    render_triggers,
)
from bench.work_rates import NUMBERS, Pool, Trial, judge, rates

POLICY = run_pb2.ScorePolicy(copy_threshold=0.95, copy_span_threshold=0.95, copy_effect_threshold=0.08, paid_ranks=10)


def test_the_page_is_what_the_document_says() -> None:
    document = json.loads(EVIDENCE.read_text())
    assert PAGE.read_text() == render(PAGE.read_text(), document), "run `python -m bench.attacks_page`"


def test_a_rate_that_changes_changes_the_page() -> None:
    document = json.loads(EVIDENCE.read_text())
    honest = next(row for row in document["rows"] if row["kind"] == "honest")
    honest["found"] = honest["hand_ins"]
    assert f"{honest['world']} 100.0%" in render(PAGE.read_text(), document)


def test_rates_count_works_and_earnings_of_the_same_cycles() -> None:
    found = [Trial("copy", "IID", "1", True, 0, 100.0), Trial("copy", "IID", "1", False, 50, 100.0)]
    (row,) = rates(found)
    assert (row["hand_ins"], row["works"], row["found"], row["found_or_unpaid"], row["earned"]) == (2, 1, 1, 1, 0.25)


@pytest.mark.parametrize("copied", [True, False])
def test_a_cycle_is_judged_in_the_order_of_its_rows(copied: bool) -> None:
    rng = np.random.default_rng(0)
    works = rng.standard_normal(NUMBERS) + rng.standard_normal((4, NUMBERS))
    if copied:
        works[3] = works[1]
    gram, gains = works @ works.T, works[:, :40]
    kinds: list[list[int]] = [[] for _ in works]
    pool = Pool("IID", 8, 0, ["honest"] * 4, kinds, gram, gram, gains, [0.4, 0.3, 0.2, 0.1])
    found, earned = judge(pool, [3, 0, 1, 2], POLICY)
    assert found.original == ({"1": "3"} if copied else {})
    assert (earned[2] == 0) == copied


def test_lies_about_tokens_are_told_as_they_were_measured() -> None:
    document = json.loads(LIES.read_text())
    page = PAGE.read_text()
    assert page == render_claims(page, document), "run `python -m bench.attacks_page --claims FILE`"
    document["figures"]["no claim, 1 of 4, tokens"]["share"] = [0.125, 0.0, 0.25]
    assert "0.125 (0.000 to 0.250)" in render_claims(page, document)


@pytest.mark.parametrize(
    ("kept", "part", "row"),
    [
        (MERGE_LIES, render_merges, "noise; 8"),
        (TRIGGERS, render_triggers, "krum"),
    ],
)
def test_other_parts_are_what_their_documents_say(kept: Path, part: Callable[[str, Any], str], row: str) -> None:
    document, page = json.loads(kept.read_text()), PAGE.read_text()
    assert page == part(page, document), "run `python -m bench.attacks_page` with that document"
    assert f"| {row} |" in page
    document["settings"]["seeds"] = 77
    assert " 77 bases" in part(page, document).replace("\n", " ")
