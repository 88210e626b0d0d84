from __future__ import annotations

from xml.etree import ElementTree

import pytest
from connito.v1 import cycle_pb2

from services.console import charts, views
from services.console.heatmap import heatmap
from services.console.views import Curve
from services.console.waterfall import Bar, waterfall
from services.console.why import Measurement, why
from tests.unit.services.console.world import MERGED, UNSURE, a_run

SVG = {"svg": "http://www.w3.org/2000/svg"}


def parse(markup: str) -> ElementTree.Element:
    """Well-formed, with a title for who does not see it, and without inline styles, which the page's policy forbids."""
    root = ElementTree.fromstring(markup)
    assert root.get("role") == "img"
    assert root.findtext("title")
    assert not [element for element in root.iter() if "style" in element.attrib]
    return root


def test_a_falling_loss_goes_down() -> None:
    root = parse(charts.sparkline(Curve("medical", True, ((0, 2.0), (1, 1.9), (2, 1.7)))))
    heights = [float(dot.get("cy", "")) for dot in root.iter("circle")]
    assert heights == sorted(heights)
    assert all(0 <= height <= charts.HEIGHT for height in heights)


@pytest.mark.parametrize("points", [((3, 2.0),), ((0, 0.0), (1, 0.0))])
def test_a_curve_without_extent_is_drawn(points: tuple[tuple[int, float], ...]) -> None:
    parse(charts.sparkline(Curve("medical", True, points)))


def test_a_waterfall_has_a_bar_a_window_and_marks_the_last_to_act() -> None:
    story = a_run()
    bars = waterfall(story.facts, 1, story.now)
    root = parse(charts.waterfall(bars))
    assert len(root.findall("rect")) == 5
    last = [line.findtext("title") for line in root.iter("line") if line.get("class") == "act last"]
    assert "ULATE…: trained" in last


def test_a_waterfall_of_a_window_that_just_opened() -> None:
    parse(charts.waterfall([Bar("train", 0, 0, True, False, (), ())]))


def test_names_from_outside_are_escaped() -> None:
    story = a_run()
    root = parse(charts.waterfall(waterfall(story.facts, 1, story.now)))
    assert "<b>bob: commitment" in [line.findtext("title") for line in root.iter("line")]


def test_intervals_say_on_which_side_of_zero_they_are() -> None:
    story = a_run()
    for miner, kind in ((MERGED, "good"), (UNSURE, "unsure")):
        found = why(story.facts, 1, miner)
        assert found is not None
        root = parse(charts.intervals(found.measurements))
        assert [dot.get("class") for dot in root.iter("circle")] == [f"effect {kind}"]


def test_an_infinite_interval_stays_inside_the_picture() -> None:
    endless = Measurement("v", cycle_pb2.SubmissionScore(effect_low=float("-inf"), effect_high=float("inf")))
    root = parse(charts.intervals([endless]))
    for line in root.iter("line"):
        assert 0 <= float(line.get("x1", "")) <= 640
        assert 0 <= float(line.get("x2", "")) <= 640


def test_a_selection_has_a_cell_an_expert() -> None:
    grid = heatmap(a_run().facts)
    assert grid is not None
    root = parse(charts.selection(grid))
    titles = [cell.findtext("title") for cell in root.iter("rect")]
    assert len(titles) == 12
    assert "layer 1, expert 5: selected, number 1 of its layer" in titles
    assert "layer 1, expert 0: frozen helper" in titles


def test_curves_of_a_run_are_drawn() -> None:
    for curve in views.curves(a_run().facts):
        assert curve.domain in (parse(charts.sparkline(curve)).findtext("title") or "")
