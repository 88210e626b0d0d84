"""Draw figures as SVG: scales with round ticks, marks with escaped text, grids of cells, and the page around them.

Own code instead of a plotting library, because the images of the services without torch draw with it and the console's
pages style its marks by class. Positions are pixels, y grows downwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

INK, DIM, FAINT, BETTER, WORSE = "#222222", "#777777", "#e4e7ea", "#0b6e99", "#b24a3a"
PALETTE = (BETTER, "#b26a00", "#7a4fa3", "#3c7d3c", "#a33b4f", "#66707a")
Attribute = str | float | None
Look = dict[str, Attribute]


@dataclass(frozen=True)
class Scale:
    """Map values from `low` to `high` to positions from `start` to `end`.

    With `linear` above zero the scale is logarithmic on both sides of zero and linear within about ±`linear`.
    """

    low: float
    high: float
    start: float
    end: float
    linear: float = 0.0

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        low, high, at = map(self._bent, (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / ((high - low) or 1.0)

    def _bent(self, value: float) -> float:
        return math.asinh(value / self.linear) if self.linear else value

    def ticks(self, most: int = 6) -> list[tuple[float, str]]:
        """Return at most `most` round values within the range, each with its label."""
        if self.linear:
            decades = [self.linear * 10.0**power for power in range(12)]
            values = [-value for value in reversed(decades)] + [0.0, *decades]
            return [(value, f"{value:g}") for value in values if self.low <= value <= self.high]
        step = _round_step((self.high - self.low) / most)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(index * step, f"{index * step:.{digits}f}") for index in range(first, last + 1)]


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least)) if least > 0 else 1.0
    return next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)


def padded(values: Iterable[float], share: float = 0.125) -> tuple[float, float]:
    """Return the range of the values with some room around it, and a range where they are all equal."""
    found = list(values)
    low, high = min(found), max(found)
    room = (high - low) * share or max(abs(high) * 0.01, 1e-6)
    return low - room, high + room


def element(name: str, content: str = "", /, **attributes: Attribute) -> str:
    """Return one element around markup. `stroke_width` becomes `stroke-width`, `class_` `class`; None is left out."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{written}>{content}</{name}>" if content else f"<{name}{written}/>"


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return escape(value)
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _titled(title: str) -> str:
    return element("title", escape(title)) if title else ""


def text(x: float, y: float, words: str, anchor: str | None = None, /, **attributes: Attribute) -> str:
    """Return text at its base line; `anchor`: start, middle or end."""
    return element("text", escape(words), x=x, y=y, text_anchor=anchor, **attributes)


def line(start: tuple[float, float], end: tuple[float, float], title: str = "", /, **attributes: Attribute) -> str:
    """Return a straight line."""
    return element("line", _titled(title), x1=start[0], x2=end[0], y1=start[1], y2=end[1], **attributes)


def polyline(points: Iterable[tuple[float, float]], /, **attributes: Attribute) -> str:
    """Return a line through points."""
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), **attributes)


def dot(x: float, y: float, radius: float, title: str = "", /, **attributes: Attribute) -> str:
    """Return a filled circle."""
    return element("circle", _titled(title), cx=x, cy=y, r=radius, **attributes)


def bar(x: tuple[float, float], y: float, height: float, title: str = "", /, **attributes: Attribute) -> str:
    """Return a horizontal bar between two positions, in either order."""
    box: Look = {"x": min(x), "y": y, "width": abs(x[1] - x[0]), "height": height}
    return element("rect", _titled(title), **box, **attributes)


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: its column, what it says to a pointer, and its attributes (fill or class)."""

    column: int
    title: str
    look: Look = field(default_factory=dict)


def cells(
    rows: Iterable[tuple[str, Iterable[Cell]]], corner: tuple[float, float], size: tuple[float, float], gap: float = 1.5
) -> Iterator[str]:
    """Yield the cells of a grid and a label left of each row. `size`: width and height of a cell with its gap."""
    (left, top), (across, down) = corner, size
    for row, (label, found) in enumerate(rows):
        y = top + row * down
        yield text(left - 8, y + down / 2 + 3, label, "end")
        for cell in found:
            x = left + cell.column * across
            yield bar((x, x + across - gap), y, down - gap, cell.title, **cell.look)


def spread(positions: Mapping[str, float], gap: float = 14.0) -> dict[str, float]:
    """Return the positions of labels, pushed apart so that none covers another."""
    placed: dict[str, float] = {}
    last = float("-inf")
    for name, position in sorted(positions.items(), key=lambda item: item[1]):
        last = placed[name] = max(position, last + gap)
    return placed


class Picture(str):
    """Markup that template engines insert as it is: its texts are escaped already."""

    def __html__(self) -> str:
        """Return the markup."""
        return self


def inline(width: float, height: float, title: str, parts: Iterable[str]) -> Picture:
    """Return a picture for an HTML page; the title is read to those who do not see it, and classes give the colours."""
    head: Look = {"role": "img", "viewBox": f"0 0 {_value(width)} {_value(height)}", "width": width, "height": height}
    return Picture(element("svg", _titled(title) + "".join(parts), **head))


def figure(width: float, height: float, heading: str, parts: Sequence[str]) -> str:
    """Return a picture for a file of its own, with its heading on a white ground."""
    ground = element("rect", width="100%", height="100%", fill="#ffffff")
    body = [ground, _titled(heading), text(20, 26, heading, font_size="15", font_weight="600"), *parts]
    look: Look = {
        "xmlns": "http://www.w3.org/2000/svg",
        "font_family": "system-ui, sans-serif",
        "font_size": "12",
        "fill": INK,
    }
    size: Look = {"viewBox": f"0 0 {_value(width)} {_value(height)}", "width": width, "height": height}
    return element("svg", "\n".join(["", *body, ""]), **look, **size) + "\n"
