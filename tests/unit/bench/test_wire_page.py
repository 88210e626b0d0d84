"""The page on wires is what `bench.wire` wrote."""

from __future__ import annotations

import copy
import json

from bench.wire_page import EVIDENCE, PAGE, render


def test_no_figure_of_the_page_is_typed() -> None:
    document = json.loads(EVIDENCE.read_text())
    assert not document["settings"]["quick"]
    assert PAGE.read_text() == render(document), "run `python -m bench.wire_page`"


def test_a_goal_that_was_missed_is_said() -> None:
    document = copy.deepcopy(json.loads(EVIDENCE.read_text()))
    for name, cell in document["figures"].items():
        if not name.startswith("upload "):
            cell["kept"] = [0.5, 0.4, 0.6]
    page = render(document)
    assert "24 × below rows" in page
    assert page.count("| missed |") >= 2
