from __future__ import annotations

from xml.etree import ElementTree

import pytest
from connito.render import svg
from hypothesis import given
from hypothesis import strategies as st

SPACE = "{http://www.w3.org/2000/svg}"
LOSSES = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False)


def test_a_scale_maps_its_ends_to_the_ends_of_the_axis() -> None:
    falling = svg.Scale(1.0, 3.0, 200, 100)
    assert [falling(value) for value in (1.0, 2.0, 3.0)] == [200, 150, 100]
    assert svg.Scale(1.0, 1.0, 0, 10)(1.0) == 0


@given(LOSSES, LOSSES)
def test_ticks_are_few_inside_the_range_and_told_apart(first: float, second: float) -> None:
    low, high = svg.padded((first, second))
    ticks = svg.Scale(low, high, 0, 1).ticks(6)
    room = (high - low) * 1e-6
    assert 1 <= len(ticks) <= 7
    assert all(low - room <= value <= high + room for value, _ in ticks)
    assert len({label for _, label in ticks}) == len(ticks)


def test_a_symmetric_logarithmic_scale_spreads_small_values_on_both_sides_of_zero() -> None:
    scale = svg.Scale(-10.0, 10.0, 0, 100, linear=0.1)
    assert scale(0.0) == pytest.approx(50)
    assert scale(1.0) - scale(0.1) == pytest.approx(scale(-0.1) - scale(-1.0))
    assert scale(1.0) - scale(0.0) > (scale(10.0) - scale(0.0)) / 2
    assert [label for _, label in scale.ticks()] == ["-10", "-1", "-0.1", "0", "0.1", "1", "10"]


def test_words_from_outside_stay_words() -> None:
    drawn = svg.figure(10, 10, "<script>", [svg.text(0, 0, "a & b"), svg.dot(1, 2, 3, '"', class_='"/><x')])
    root = ElementTree.fromstring(drawn)
    assert [element.text for element in root.iter(f"{SPACE}text")] == ["<script>", "a & b"]
    assert [dot.get("class") for dot in root.iter(f"{SPACE}circle")] == ['"/><x']


def test_cells_stand_in_their_rows_and_columns() -> None:
    rows = [("layer 0", [svg.Cell(0, "a", {"fill": "red"})]), ("layer 2", [svg.Cell(3, "b"), svg.Cell(4, "c")])]
    root = ElementTree.fromstring(svg.inline(100, 50, "grid", svg.cells(rows, (20, 5), (10, 8), gap=1)))
    places = [(box.get("x"), box.get("y"), box.get("width"), box.findtext("title")) for box in root.iter("rect")]
    assert places == [("20", "5", "9", "a"), ("50", "13", "9", "b"), ("60", "13", "9", "c")]
    assert [label.text for label in root.iter("text")] == ["layer 0", "layer 2"]


def test_labels_at_one_place_are_pushed_apart() -> None:
    placed = svg.spread({"a": 10.0, "b": 10.0, "c": 80.0})
    assert placed == {"a": 10.0, "b": 24.0, "c": 80.0}
