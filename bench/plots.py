"""Axes to draw results on, side by side in one SVG file, so that every figure looks alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from connito.render import svg

WIDTH, HEIGHT, TOP, BOTTOM, CHARACTER = 460, 340, 34, 46, 6.6
BLUE, GREEN, RED, GREY = "#5b7fa6", "#2f6f4f", "#a63d40", "#8a8a8a"
Draw = Callable[[svg.Scale, svg.Scale], list[str]]
Points = Sequence[tuple[float, float]]
Spread = tuple[float, float, float]


class Axes:
    """One pair of axes: marks in the units of the data, drawn when all are known and the ranges follow from them."""

    def __init__(self) -> None:
        self.title, self.x_label, self.y_label = "", "", ""
        self.x_linear = self.y_linear = 0.0
        self._marks: list[Draw] = []
        self._xs: list[float] = []
        self._ys: list[float] = []
        self._rows: Sequence[str] = ()
        self._legend: list[tuple[str, str]] = []

    def line(self, points: Points, colour: str, label: str = "", *, dashed: bool = False, dots: bool = False) -> None:
        """Add a line through points; a label puts it into the legend."""
        self._cover(points, label, colour)
        look: svg.Look = {"stroke": colour, "stroke_dasharray": "5 3" if dashed else None}
        self._marks.append(lambda x, y: [svg.polyline([(x(a), y(b)) for a, b in points], fill="none", **look)])
        if dots:
            self._marks.append(lambda x, y: [svg.dot(x(a), y(b), 3, fill=colour) for a, b in points])

    def band(self, lower: Points, upper: Points, colour: str) -> None:
        """Add the area between two lines."""
        around = [*lower, *reversed(upper)]
        self._cover(around)
        look: svg.Look = {"fill": colour, "opacity": 0.15}
        self._marks.append(lambda x, y: [svg.polyline([(x(a), y(b)) for a, b in around], **look)])

    def estimate(self, across: Spread, up: Spread, colour: str, *, filled: bool) -> None:
        """Add a dot with its interval in both directions, each (mean, low, high)."""
        self._cover([*zip(across, up, strict=True)])
        (a, a_low, a_high), (b, b_low, b_high) = across, up
        self._marks.append(
            lambda x, y: [
                svg.line((x(a_low), y(b)), (x(a_high), y(b)), stroke=colour),
                svg.line((x(a), y(b_low)), (x(a), y(b_high)), stroke=colour),
                svg.dot(x(a), y(b), 4, fill=colour if filled else "#ffffff", stroke=colour),
            ]
        )

    def rows(self, names: Sequence[str]) -> None:
        """Put names on the vertical axis, row 0 on top."""
        self._rows = names
        self._ys += [-0.6, len(names) - 0.4]

    def bars(self, values: Mapping[str, Spread], label: str) -> None:
        """Add one horizontal bar a name, (mean, low, high) with the interval as a whisker; the first name on top."""
        self.x_label = label
        self.rows(list(values))
        for row, (mean, low, high) in enumerate(values.values()):
            self.bar(row, mean, 0.7, BLUE)
            self.line([(min(low, mean), row), (max(high, mean), row)], svg.INK)

    def bar(self, row: float, value: float, thick: float, colour: str) -> None:
        """Add a horizontal bar from zero, `thick` rows high, in the middle of a row."""
        self._xs += [0.0, value]
        high = row - thick / 2
        self._marks.append(lambda x, y: [svg.bar((x(0), x(value)), y(high), y(high + thick) - y(high), fill=colour)])

    def ticks(self, row: float, values: Sequence[float], colour: str) -> None:
        """Add one upright stroke a value in a row."""
        self._xs += values
        self._marks.append(
            lambda x, y: [svg.line((x(v), y(row) - 6), (x(v), y(row) + 6), stroke=colour) for v in values]
        )

    def key(self, label: str, colour: str) -> None:
        """Add a line to the legend."""
        self._legend.append((label, colour))

    def upright(self, at: float, colour: str = svg.DIM) -> None:
        """Add a line across the panel's height."""
        self._xs.append(at)
        self._marks.append(lambda x, y: [svg.line((x(at), y.start), (x(at), y.end), stroke=colour)])

    def level(self, at: float, colour: str = svg.DIM) -> None:
        """Add a line across the panel's width."""
        self._ys.append(at)
        self._marks.append(lambda x, y: [svg.line((x.start, y(at)), (x.end, y(at)), stroke=colour)])

    def _cover(self, points: Points, label: str = "", colour: str = "") -> None:
        self._xs += [a for a, _ in points]
        self._ys += [b for _, b in points]
        if label:
            self.key(label, colour)

    def draw(self, offset: float, height: float) -> list[str]:
        """Return the panel's markup, its left edge at `offset`."""
        names = max((len(name) for name in self._rows), default=0)
        left, right = offset + max(64, 12 + CHARACTER * names), offset + WIDTH - 16 - self._legend_width
        # A bar starts at zero, at the very edge of the panel where no value lies beyond.
        low, high = svg.padded(self._xs or [0.0], 0.04)
        inside = self._rows and min(self._xs) >= 0
        x = svg.Scale(0.0 if inside else low, high, left, right, self.x_linear)
        bottom = height - BOTTOM
        floor, ceiling = (max(self._ys), min(self._ys)) if self._rows else svg.padded(self._ys, 0.05)
        y = svg.Scale(floor, ceiling, bottom, TOP, self.y_linear)
        middle = (left + right) / 2
        parts = [svg.text(middle, TOP - 12, self.title, "middle"), svg.text(middle, height - 8, self.x_label, "middle")]
        for value, label in x.ticks():
            parts.append(svg.line((x(value), TOP), (x(value), bottom), stroke=svg.FAINT))
            parts.append(svg.text(x(value), bottom + 16, label, "middle", fill=svg.DIM))
        marks = [(row, name) for row, name in enumerate(self._rows)] or y.ticks()
        for level, label in marks:
            parts.append(svg.line((left, y(level)), (right, y(level)), stroke=svg.FAINT))
            parts.append(svg.text(left - 6, y(level) + 4, label, "end", fill=svg.DIM))
        turned = f"rotate(-90 {offset + 14:.0f} {(TOP + bottom) / 2:.0f})"
        parts.append(svg.text(offset + 14, (TOP + bottom) / 2, self.y_label, "middle", transform=turned))
        parts += [part for mark in self._marks for part in mark(x, y)]
        for place, (label, colour) in enumerate(self._legend):
            parts.append(svg.bar((right + 10, right + 20), TOP + 4 + 15 * place, 10, fill=colour))
            parts.append(svg.text(right + 25, TOP + 13 + 15 * place, label))
        return parts

    @property
    def _legend_width(self) -> float:
        return max((28 + CHARACTER * len(label) for label, _ in self._legend), default=0.0)

    @property
    def height(self) -> float:
        """Return the panel's height in pixels, at least what its rows need to stay legible."""
        return max(HEIGHT, TOP + BOTTOM + 17 * len(self._rows))


@contextmanager
def axes(path: Path, count: int = 1) -> Iterator[list[Axes]]:
    """Yield `count` axes side by side; on leaving, write them to `path` (SVG)."""
    drawn = [Axes() for _ in range(count)]
    yield drawn
    height = max(panel.height for panel in drawn)
    parts = [part for place, panel in enumerate(drawn) for part in panel.draw(place * WIDTH, height)]
    path.write_text(svg.figure(WIDTH * count, height, "", parts))
