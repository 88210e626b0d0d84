from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from bench.plots import GREEN, RED, axes

SPACE = "{http://www.w3.org/2000/svg}"


def drawn(path: Path, kind: str) -> list[ElementTree.Element]:
    return list(ElementTree.parse(path).iter(f"{SPACE}{kind}"))


def test_bars_stand_in_their_order_and_as_long_as_their_means(tmp_path: Path) -> None:
    with axes(tmp_path / "bars.svg") as (axis,):
        axis.bars({"full": (1.0, 0.9, 1.1), "half": (0.5, 0.5, 0.5)}, "share")
    bars = drawn(tmp_path / "bars.svg", "rect")[1:]
    full, half = (float(bar.get("width", "")) for bar in bars)
    assert abs(full - 2 * half) < 0.1
    assert float(bars[0].get("y", "")) < float(bars[1].get("y", ""))
    assert {"full", "half", "share"} <= {element.text for element in drawn(tmp_path / "bars.svg", "text")}


def test_panels_stand_side_by_side_with_lines_bands_and_a_legend(tmp_path: Path) -> None:
    with axes(tmp_path / "lines.svg", 2) as (left, right):
        left.line([(0, 2.0), (1, 1.0)], GREEN, "falls", dots=True)
        left.band([(0, 1.9), (1, 0.9)], [(0, 2.1), (1, 1.1)], GREEN)
        right.estimate((0.0, -1.0, 1.0), (0.5, 0.4, 0.6), RED, filled=True)
        right.x_linear = 0.05
    dots = drawn(tmp_path / "lines.svg", "circle")
    (x0, y0), (x1, y1), (x2, _) = ((float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in dots)
    assert x0 < x1 < 460 < x2
    assert y0 < y1
    assert "falls" in {element.text for element in drawn(tmp_path / "lines.svg", "text")}
