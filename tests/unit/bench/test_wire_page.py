"""The page on wires is what `bench.wire` wrote."""

from __future__ import annotations

import copy
import json

from bench.evidence import COPIES
from bench.wire_page import NAMES, PAGE, render

DOCUMENTS = [json.loads((COPIES / f"{name}.json").read_text()) for name in NAMES]


def test_no_figure_of_the_page_is_typed() -> None:
    assert not any(document["settings"]["quick"] for document in DOCUMENTS)
    assert PAGE.read_text() == render(*DOCUMENTS), "run `python -m bench.wire_page`"


def test_a_bound_that_was_broken_is_said() -> None:
    hostile = copy.deepcopy(DOCUMENTS[1])
    hostile["figures"]["within"] = False
    assert "beyond the bound" in render(DOCUMENTS[0], hostile)
    assert "beyond the bound" not in PAGE.read_text()


def test_a_goal_that_was_missed_is_said() -> None:
    document = copy.deepcopy(DOCUMENTS[0])
    for name, cell in document["figures"].items():
        if not name.startswith("upload "):
            cell["kept"] = [0.5, 0.4, 0.6]
    page = render(document, DOCUMENTS[1])
    assert "24 × below rows" in page
    assert page.count("| missed |") >= 2
