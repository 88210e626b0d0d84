"""The figures on the page of sizes are those of the published documents."""

from __future__ import annotations

import json

import pytest

from bench.evidence import COPIES
from bench.sizing_page import AVAILABILITY, AVAILABILITY_PARTS, COST_PARTS, COSTS, PAGE, PARTS, render


@pytest.mark.parametrize("name", PARTS)
def test_the_page_is_what_the_documents_say(name: str) -> None:
    document = json.loads((COPIES / f"{name}.json").read_text())
    assert PAGE.read_text() == render(PAGE.read_text(), document), "run `python -m bench.sizing_page`"


def test_the_page_of_costs_is_too() -> None:
    document = json.loads((COPIES / "control_plane.json").read_text())
    assert COSTS.read_text() == render(COSTS.read_text(), document, COST_PARTS), "run `python -m bench.sizing_page`"
    document["rows"][-1]["committer_cpu_s"] = 3600.0
    assert "4320.0" in render(COSTS.read_text(), document, COST_PARTS)


def test_the_page_of_storms_is_too() -> None:
    document = json.loads((COPIES / "simulate.json").read_text())
    assert AVAILABILITY.read_text() == render(AVAILABILITY.read_text(), document, AVAILABILITY_PARTS)
    document["figures"]["wrong"] = {"17": ["a reveal without an answer"]}
    assert "wrong in 1 of them: seeds 17" in render(AVAILABILITY.read_text(), document, AVAILABILITY_PARTS)
    document = json.loads((COPIES / "chaos.json").read_text())
    assert AVAILABILITY.read_text() == render(AVAILABILITY.read_text(), document, AVAILABILITY_PARTS)
    document["rows"][-1] |= {"slowest": [[4713.0, "weed"]], "wrong": ["a reveal without an answer"]}
    page = render(AVAILABILITY.read_text(), document, AVAILABILITY_PARTS)
    assert "4713.0 s" in page
    assert "by the audit in none" not in page


def test_a_figure_that_changes_changes_the_page() -> None:
    document = json.loads((COPIES / "starting.json").read_text())
    document["rows"][0]["again"]["seconds"] = 4711.0
    assert "4711.0 s" in render(PAGE.read_text(), document)
    document = json.loads((COPIES / "control_plane.json").read_text())
    document["rows"][-1]["committer_cpu_s"] = 4712.0
    assert "4712.00" in render(PAGE.read_text(), document)
