"""Draw the console's charts on the server, styled by class from the style sheet.

Each chart is an image with a title for those who do not see it; pages put the same numbers into a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from connito.render import formats, svg

from .cards import Effect
from .heatmap import FigureMap, Heatmap
from .views import Curve
from .waterfall import Bar
from .why import Measurement

WIDTH, HEIGHT = 320, 132
# Round times, in seconds, to put on an axis.
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 22
MARKS = 16


def span(curves: Iterable[Curve]) -> float:
    """Return the nats that every curve's axis covers, so that equal slopes are equal changes: the widest course, with room."""
    courses = [[loss for _, loss in curve.points] for curve in curves]
    return max((high - low for low, high in (svg.padded(course) for course in courses)), default=0.0)


def sparkline(curve: Curve, nats: float = 0.0, here: int | None = None) -> svg.Picture:
    """Draw a loss curve by version, around its own level, on an axis of `nats`; version `here` is marked."""
    first, last = curve.points[0][0], curve.points[-1][0]
    x = svg.Scale(first, max(last, first + 1), LEFT, WIDTH - RIGHT)
    low, high = svg.padded(loss for _, loss in curve.points)
    more = max(0.0, nats - (high - low)) / 2
    y = svg.Scale(low - more, high + more, HEIGHT - BOTTOM, TOP)
    parts = [] if here is None else [svg.line((x(here), TOP), (x(here), HEIGHT - BOTTOM), class_="zero")]
    for value, label in y.ticks(3):
        parts.append(svg.line((LEFT, y(value)), (WIDTH - RIGHT, y(value)), class_="grid"))
        parts.append(svg.text(LEFT - 5, y(value) + 4, label, "end"))
    kind = "target" if curve.target else "general"
    parts.append(svg.polyline(((x(version), y(loss)) for version, loss in curve.points), class_=f"line {kind}"))
    # Many marks would hide the line.
    marked = curve.points if len(curve.points) <= MARKS else [p for p in curve.points if p[0] in (first, here, last)]
    for version, loss in marked:
        parts.append(svg.dot(x(version), y(loss), 3, f"version {version}: {formats.loss(loss)}", class_="dot"))
    for version in sorted({first, last}):
        parts.append(svg.text(x(version), HEIGHT - 6, f"v{version}", "start" if version == first else "end"))
    return svg.inline(WIDTH, HEIGHT, _curve_words(curve), parts)


def waterfall(bars: Sequence[Bar]) -> svg.Picture:
    """Draw windows one below the other along the cycle's time; ticks are acts, the last to act is marked and named."""
    width, row, left, right = 960, 34, 82, 84
    end = max((bar.end_ms for bar in bars), default=0) or 1
    height = row * len(bars) + 24
    x = svg.Scale(0, end, left, width - right)
    parts = []
    for tick in _ticks(end):
        parts.append(svg.line((x(tick), 0), (x(tick), height - 20), class_="grid"))
        parts.append(svg.text(x(tick), height - 6, formats.duration(tick / 1000) if tick else "0", "middle"))
    for index, bar in enumerate(bars):
        parts += _bar(bar, index * row + 5, row - 12, x)
    return svg.inline(width, height, "; ".join(bar.summary for bar in bars), parts)


def intervals(measurements: Sequence[Measurement]) -> svg.Picture:
    """Draw effect and interval of each validator on one axis with zero on it; left of zero the loss rose."""
    rows = [
        Interval(
            item.validator, item.score.effect, item.score.effect_low, item.score.effect_high, _interval_words(item)
        )
        for item in measurements
    ]
    return _intervals(rows, better=1)


def effects(found: Sequence[Effect]) -> svg.Picture:
    """Draw what an expert does to the loss on each domain, with its interval; left of zero it is lower."""
    return _intervals(
        [Interval(one.domain, one.change, one.low, one.high, _effect_words(one)) for one in found], better=-1
    )


@dataclass(frozen=True)
class Interval:
    """A measured figure with its interval: whose it is, and what it says to who does not see it."""

    name: str
    at: float
    low: float
    high: float
    words: str


def _intervals(rows: Sequence[Interval], better: int) -> svg.Picture:
    """Draw intervals below each other, each under its name: on a telephone, too, the picture fits. `better`: side of zero."""
    width, row = 460, 40
    ends = [value for one in rows for value in (one.low, one.high, one.at) if math.isfinite(value)]
    low, high = svg.padded([0.0, *ends])
    x = svg.Scale(low, high, 8, width - 8)
    height = row * len(rows) + 24
    words, place, anchor = ("lower loss →", width - 2, "end") if better > 0 else ("← lower loss", 2, "start")
    parts = [
        svg.line((x(0.0), 2), (x(0.0), height - 20), class_="zero"),
        svg.text(x(0.0), height - 6, "0", "middle"),
        svg.text(place, height - 6, words, anchor),
    ]
    for index, one in enumerate(rows):
        y, worst, best = index * row + 28, *sorted((better * one.low, better * one.high))
        kind = "good" if worst > 0 else "bad" if best < 0 else "unsure"
        start, stop = (x(min(max(value, low), high)) for value in (one.low, one.high))
        parts.append(svg.text(2, y - 12, one.name[:48], "start"))
        parts.append(svg.line((start, y), (stop, y), class_=f"interval {kind}"))
        parts.append(svg.dot(x(one.at), y, 4, one.words, class_=f"effect {kind}"))
    return svg.inline(width, height, "; ".join(one.words for one in rows), parts)


def lineage(name: str, parents: Sequence[str], children: Sequence[str]) -> svg.Picture:
    """Draw an expert between what it was made of and what was made of it."""
    width, row, box = 760, 30, 220
    height = row * max(1, len(parents), len(children)) + 12
    columns = ((0, parents), (270, [name]), (540, children))
    parts = []
    for x, names in columns:
        for index, each in enumerate(names):
            y = height / 2 + row * (index - (len(names) - 1) / 2)
            kind = "here" if x == 270 else "relative"
            if x != 270:
                ends = ((box, y), (270, height / 2)) if x == 0 else ((270 + box, height / 2), (540, y))
                parts.append(svg.line(*ends, class_="descent"))
            parts.append(svg.bar((x, x + box), y - 11, 22, each, class_=f"expert {kind}", rx=4))
            parts.append(svg.text(x + 8, y + 4, each if len(each) < 31 else f"{each[:29]}…", "start"))
    made = f"{name}, made of {', '.join(parents) or 'the base'}"
    return svg.inline(width, height, f"{made}; made of it: {', '.join(children) or 'nothing yet'}", parts)


def selection(grid: Heatmap) -> svg.Picture:
    """Draw layer by expert; the better its place in the layer, the stronger the colour; helpers have one of their own."""
    rows = [
        (layer, [(item.expert, _shade(item.rank, item.helper, grid), item.words) for item in cells])
        for layer, cells in grid.layers
    ]
    return _cells(
        f"{grid.selected} of {formats.count(grid.total, 'expert')} selected in {formats.count(len(grid.layers), 'layer')}",
        rows,
        grid.columns,
    )


def figure_map(figures: FigureMap) -> svg.Picture:
    """Draw layer by expert; the larger the figure, the stronger the colour. Experts without a figure are left out."""
    leaders = ", ".join(f"layer {layer} expert {expert} {figure:.3f}" for layer, expert, figure in figures.leaders)
    rows = [
        (layer, [(expert, _heat(figure, figures.highest), f"expert {expert}: {figure:.4f}") for expert, figure in row])
        for layer, row in figures.layers
    ]
    return _cells(f"{figures.what}; largest: {leaders}", rows, figures.columns)


def _cells(title: str, rows: Sequence[tuple[int, Sequence[tuple[int, str, str]]]], columns: int) -> svg.Picture:
    """Draw rows of (expert, class, words) by layer, with an axis of experts."""
    left, cell, top = 62, 18 if columns <= 40 else 9, 4
    width, height = left + cell * max(1, columns) + 4, top + cell * len(rows) + 22
    grid = (
        (f"layer {layer}", [svg.Cell(e, f"layer {layer}, {words}", {"class": f"cell {kind}", "rx": 2}) for e, kind, words in row])
        for layer, row in rows
    )  # fmt: skip
    parts = list(svg.cells(grid, (left, top), (cell, cell), gap=2))
    for expert in range(0, columns, max(1, math.ceil(columns / 12))):
        parts.append(svg.text(left + expert * cell + (cell - 2) / 2, height - 6, str(expert), "middle"))
    return svg.inline(width, height, title, parts)


def _heat(figure: float, highest: float) -> str:
    """Return the strongest of four shades for the largest figure, none for zero."""
    return "none" if figure <= 0 or highest <= 0 else f"s{4 - min(3, int(4 * figure / highest))}"


def _bar(bar: Bar, y: float, height: float, x: svg.Scale) -> Iterable[str]:
    kind = "open" if bar.open else "late" if bar.by_deadline else "closed"
    yield svg.text(0, y + height / 2 + 4, bar.window, "start")
    start, end = x(bar.start_ms), x(bar.end_ms)
    yield svg.bar((start, max(start + 2, end)), y, height, bar.summary, class_=f"bar {kind}", rx=3)
    for act in bar.acts:
        at, last = x(act.at_ms), " last" if act is bar.last else ""
        yield svg.line((at, y + 1), (at, y + height - 1), f"{act.who}: {act.what}", class_=f"act{last}")
    yield svg.text(end + 5, y + height / 2 + 4, formats.duration((bar.end_ms - bar.start_ms) / 1000), "start")


def _shade(rank: int, helper: bool, grid: Heatmap) -> str:
    if not rank:
        return "helper" if helper else "none"
    return f"s{1 + round(3 * (rank - 1) / max(1, grid.deepest_rank - 1))}"


def _ticks(end: float) -> list[float]:
    """Return 0 and up to five round times until `end` milliseconds."""
    step = next((step * 1000 for step in STEPS if step * 5000 >= end), end)
    return [step * index for index in range(int(end / step) + 1)]


def _curve_words(curve: Curve) -> str:
    (start, before), (stop, after) = curve.points[0], curve.points[-1]
    return f"{curve.domain}: {formats.loss(before)} nats per token at version {start}, {formats.loss(after)} at version {stop}"


def _effect_words(one: Effect) -> str:
    change, low, high = map(formats.change, (one.change, one.low, one.high))
    return f"{one.domain}: {change}, between {low} and {high} nats per token"


def _interval_words(item: Measurement) -> str:
    effect, low, high = map(formats.change, (item.score.effect, item.score.effect_low, item.score.effect_high))
    return f"{item.validator}: {effect}, between {low} and {high} nats per token"
