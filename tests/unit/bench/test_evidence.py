"""The page of evidence says what the published documents say, and nothing is published from a quick run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import evidence
from bench.costs_page import COSTS, render_costs
from bench.evidence import nats, percent, publish, published, render
from bench.library_page import PAGE as LIBRARY
from bench.library_page import render as render_library
from bench.pages import EVERY, NAMES, Page

PUBLISHED = [page for page in EVERY if set(page.names) <= set(published())]


@pytest.mark.parametrize("page", PUBLISHED, ids=lambda page: "-".join(page.names[:2]))
def test_a_page_is_what_the_documents_say(page: Page) -> None:
    documents = published()
    assert page.path.read_text() == page.written(documents), "run `python -m bench.evidence` after the benchmarks"


def test_every_published_document_is_on_a_page() -> None:
    assert set(published()) <= set(NAMES)
    assert len(PUBLISHED) > 6


def test_every_quality_claim_has_five_seeds() -> None:
    documents = published()
    for name in (
        "selection",
        "routing_modes",
        "residency",
        "forgetting",
        "decentralised",
        "engine",
        "search",
        "lifecycle",
        "compounding",
    ):
        assert documents[name]["settings"]["seeds"] >= 5
        assert len({row["seed"] for row in documents[name]["rows"] if "seed" in row}) >= 5


def test_a_figure_that_changes_changes_the_page() -> None:
    documents = json.loads(json.dumps(published()))
    documents["selection"]["figures"]["gain_selected"] = [9.125, 9.0, 9.25]
    assert "9.125 (9.000 to 9.250)" in render(documents)
    documents["engine"]["figures"]["speed, connito"]["tokens_per_second"] = 98765
    assert "| connito | 98765 |" in render_costs(COSTS.read_text(), documents)
    documents["search"]["figures"]["search_p50_ms"] = 4713.0
    assert "4713.0 ms at the median" in render_library(LIBRARY.read_text(), documents["search"])


def test_full_runs_are_published_and_quick_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(evidence, "COPIES", kept)
    assert publish(tmp_path, NAMES) == []
    for name in ("selection", "goals", "unknown"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"settings": {"quick": False}}))
    (tmp_path / "selection.svg").write_text("<svg/>")
    assert publish(tmp_path, ("cost", "selection", "goals")) == ["selection", "goals"]
    assert sorted(path.name for path in kept.iterdir()) == ["goals.json", "selection.json", "selection.svg"]
    (tmp_path / "cost.json").write_text(json.dumps({"settings": {"quick": True}}))
    (tmp_path / "selection.json").write_text(json.dumps({"settings": {"quick": False}, "rows": [1]}))
    with pytest.raises(ValueError, match="quick run"):
        publish(tmp_path, NAMES)
    assert "rows" not in json.loads((kept / "selection.json").read_text())


def test_figures_are_written_with_their_interval() -> None:
    assert nats([-0.0119, -0.02, 0.001]) == "−0.012 (−0.020 to 0.001)"
    assert percent([1.0153, 0.991, 1.04]) == "102 % (99 to 104)"
