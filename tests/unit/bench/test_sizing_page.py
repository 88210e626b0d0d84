"""The figures on the page of sizes are those of the published document."""

from __future__ import annotations

import json

from bench.sizing_page import EVIDENCE, PAGE, render


def test_the_page_is_what_the_document_says() -> None:
    document = json.loads(EVIDENCE.read_text())
    assert PAGE.read_text() == render(PAGE.read_text(), document), "run `python -m bench.sizing_page`"


def test_a_figure_that_changes_changes_the_page() -> None:
    document = json.loads(EVIDENCE.read_text())
    document["rows"][0]["again"]["seconds"] = 4711.0
    assert "4711.0 s" in render(PAGE.read_text(), document)
