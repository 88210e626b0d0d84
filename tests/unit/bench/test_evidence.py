"""The page of evidence says what the published documents say, and nothing is published from a quick run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench.costs_page import COSTS, render_costs
from bench.evidence import COPIES, NAMES, PAGE, load, nats, percent, render


def test_the_page_is_what_the_documents_say() -> None:
    documents = load(COPIES)
    assert PAGE.read_text() == render(documents), "run `python -m bench.evidence` after the benchmarks"
    assert COSTS.read_text() == render_costs(COSTS.read_text(), documents), "the same"


def test_every_quality_claim_has_five_seeds() -> None:
    documents = load(COPIES)
    for name in ("selection", "routing_modes", "residency", "forgetting", "decentralised", "engine"):
        assert documents[name]["settings"]["seeds"] >= 5
        assert len({row["seed"] for row in documents[name]["rows"] if "seed" in row}) >= 5


def test_a_figure_that_changes_changes_the_page() -> None:
    documents = {name: json.loads(json.dumps(document)) for name, document in load(COPIES).items()}
    documents["selection"]["figures"]["gain_selected"] = [9.125, 9.0, 9.25]
    assert "9.125 (9.000 to 9.250)" in render(documents)
    documents["engine"]["figures"]["speed, connito"]["tokens_per_second"] = 98765
    assert "| connito | 98765 |" in render_costs(COSTS.read_text(), documents)


def test_quick_and_missing_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selection\.json is missing: run"):
        load(tmp_path)
    for name in NAMES:
        shutil.copyfile(COPIES / f"{name}.json", tmp_path / f"{name}.json")
    assert set(load(tmp_path)) == set(NAMES)
    quick = json.loads((tmp_path / "cost.json").read_text())
    quick["settings"]["quick"] = True
    (tmp_path / "cost.json").write_text(json.dumps(quick))
    with pytest.raises(ValueError, match="quick run"):
        load(tmp_path)


def test_figures_are_written_with_their_interval() -> None:
    assert nats([-0.0119, -0.02, 0.001]) == "−0.012 (−0.020 to 0.001)"
    assert percent([1.0153, 0.991, 1.04]) == "102 % (99 to 104)"
