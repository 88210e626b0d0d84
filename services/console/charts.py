"""Charts as SVG, drawn on the server: numbers in, markup out. Colours come from the style sheet, by class.

Each chart is an image with a title for those who do not see it; pages put the same numbers into a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from .heatmap import Heatmap, Warmth
from .views import Curve
from .waterfall import Bar
from .why import Measurement
from .words import duration

_Place = Callable[[float], float]
_Point = Callable[[int, float], tuple[float, float]]

WIDTH, HEIGHT = 320, 132
# Round times, in seconds, to put on an axis.
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)
CELL = Markup(
    '<rect class="cell {}" x="{}" y="{}" width="{size}" height="{size}" rx="2"><title>layer {}, {}</title></rect>'
)
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 22


def sparkline(curve: Curve) -> Markup:
    """A loss curve by version, with an axis of its own: curves differ in level, and what counts is each one's way."""
    values = [loss for _, loss in curve.points]
    low, high = _padded(min(values), max(values))
    first, last = curve.points[0][0], max(curve.points[-1][0], curve.points[0][0] + 1)

    def place(version: int, loss: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * (version - first) / (last - first)
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)

    points = [place(*point) for point in curve.points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [_title(_curve_words(curve)), *_levels(low, high, place, first)]
    parts.append(
        Markup('<polyline class="line {}" points="{}"/>').format("target" if curve.target else "general", line)
    )
    for (version, loss), (x, y) in zip(curve.points, points, strict=True):
        dot = Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="3"><title>version {}: {:.4f}</title></circle>')
        parts.append(dot.format(x, y, version, loss))
    for version in sorted({first, curve.points[-1][0]}):
        x, _ = place(version, low)
        parts.append(_text(x, HEIGHT - 6, f"v{version}", "start" if version == first else "end"))
    return _svg(WIDTH, HEIGHT, parts)


def waterfall(bars: Sequence[Bar]) -> Markup:
    """Windows one below the other along the cycle's time; ticks are acts, the last to act is marked and named."""
    width, row, left, right = 960, 34, 82, 84
    end = max((bar.end_ms for bar in bars), default=0) or 1
    height = row * len(bars) + 24

    def x(milliseconds: float) -> float:
        return left + (width - left - right) * milliseconds / end

    parts = [_title("; ".join(bar.summary for bar in bars))]
    for tick in _ticks(end):
        parts.append(
            Markup('<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="{1}"/>').format(x(tick), height - 20)
        )
        parts.append(_text(x(tick), height - 6, duration(tick) if tick else "0", "middle"))
    for index, bar in enumerate(bars):
        parts += _bar(bar, index * row + 5, row - 12, x)
    return _svg(width, height, parts)


def intervals(measurements: Sequence[Measurement]) -> Markup:
    """Effect and interval of each validator on one axis with zero on it; left of zero the loss rose."""
    width, row, left = 640, 28, 150
    ends = [value for item in measurements for value in (item.low, item.high, item.effect) if math.isfinite(value)]
    low, high = _padded(min([0.0, *ends]), max([0.0, *ends]))
    height = row * len(measurements) + 26

    def x(effect: float) -> float:
        return left + (width - left - 14) * (min(max(effect, low), high) - low) / (high - low)

    parts = [_title("; ".join(_interval_words(item) for item in measurements))]
    parts.append(Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="2" y2="{1}"/>').format(x(0.0), height - 20))
    parts.append(_text(x(0.0), height - 6, "0", "middle"))
    if high - low > 0:
        parts.append(_text(width - 14, height - 6, "lower loss →", "end"))
    for index, item in enumerate(measurements):
        y = index * row + 16
        kind = "good" if item.low > 0 else "bad" if item.high < 0 else "unsure"
        parts.append(_text(0, y + 4, item.validator, "start"))
        line = Markup('<line class="interval {}" x1="{:.1f}" x2="{:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(line.format(kind, x(item.low), x(item.high), y=y))
        dot = Markup('<circle class="effect {}" cx="{:.1f}" cy="{}" r="4"><title>{}</title></circle>')
        parts.append(dot.format(kind, x(item.effect), y, _interval_words(item)))
    return _svg(width, height, parts)


def selection(grid: Heatmap) -> Markup:
    """Layer by expert; the better its place in the layer, the stronger the colour; helpers have one of their own."""
    title = f"{grid.selected} of {grid.total} experts selected in {len(grid.layers)} layers"
    rows = [
        (layer, [(item.expert, _shade(item.rank, item.helper, grid), item.words) for item in cells])
        for layer, cells in grid.layers
    ]
    return _cells(title, rows, grid.columns)


def warmth(figures: Warmth) -> Markup:
    """Layer by expert; the larger the figure, the stronger the colour. What has no figure is not drawn."""
    leaders = ", ".join(f"layer {layer} expert {expert} {figure:.3f}" for layer, expert, figure in figures.leaders)
    rows = [
        (layer, [(expert, _heat(figure, figures.highest), f"expert {expert}: {figure:.4f}") for expert, figure in row])
        for layer, row in figures.layers
    ]
    return _cells(f"{figures.what}; largest: {leaders}", rows, figures.columns)


def _cells(title: str, rows: Sequence[tuple[int, Sequence[tuple[int, str, str]]]], columns: int) -> Markup:
    """Rows of (expert, class, words) by layer, with an axis of experts."""
    left, cell, top = 62, 18 if columns <= 40 else 9, 4
    width, height = left + cell * max(1, columns) + 4, top + cell * len(rows) + 22
    parts = [_title(title)]
    for row, (layer, cells) in enumerate(rows):
        y = top + row * cell
        parts.append(_text(left - 8, y + cell - 5, f"layer {layer}", "end"))
        for expert, kind, text in cells:
            parts.append(CELL.format(kind, left + expert * cell, y, layer, text, size=cell - 2))
    for expert in range(0, columns, max(1, math.ceil(columns / 12))):
        parts.append(_text(left + expert * cell + (cell - 2) / 2, height - 6, str(expert), "middle"))
    return _svg(width, height, parts)


def _heat(figure: float, highest: float) -> str:
    """The strongest of four shades for the largest figure, none for zero."""
    return "none" if figure <= 0 or highest <= 0 else f"s{4 - min(3, int(4 * figure / highest))}"


def _bar(bar: Bar, y: float, height: float, x: _Place) -> Iterable[Markup]:
    kind = "open" if bar.open else "late" if bar.by_deadline else "closed"
    yield _text(0, y + height / 2 + 4, bar.window, "start")
    box = Markup('<rect class="bar {}" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="3"><title>{}</title></rect>')
    start, end = x(bar.start_ms), x(bar.end_ms)
    yield box.format(kind, start, y, max(2.0, end - start), height, bar.summary)
    for act in bar.acts:
        mark = Markup('<line class="act{}" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"><title>{}: {}</title></line>')
        last = " last" if act is bar.last else ""
        yield mark.format(last, y + 1, y + height - 1, act.who, act.what, x=x(act.at_ms))
    yield _text(end + 5, y + height / 2 + 4, duration(bar.end_ms - bar.start_ms), "start")


def _shade(rank: int, helper: bool, grid: Heatmap) -> str:
    if not rank:
        return "helper" if helper else "none"
    return f"s{1 + round(3 * (rank - 1) / max(1, grid.deepest_rank - 1))}"


def _levels(low: float, high: float, place: _Point, first: int) -> Iterable[Markup]:
    digits = 3 if high - low > 0.01 else 4 if high - low > 0.001 else 5
    for value in (low + (high - low) * share for share in (0.1, 0.5, 0.9)):
        _, y = place(first, value)
        grid = Markup('<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>')
        yield grid.format(LEFT, WIDTH - RIGHT, y=y)
        yield _text(LEFT - 5, y + 4, f"{value:.{digits}f}", "end")


def _padded(low: float, high: float) -> tuple[float, float]:
    """Some room around a range, and a range where there is none."""
    room = (high - low) * 0.125 or max(abs(high) * 0.01, 1e-6)
    return low - room, high + room


def _ticks(end: float) -> list[float]:
    """0 and up to five round times until `end` milliseconds."""
    step = next((step * 1000 for step in STEPS if step * 5000 >= end), end)
    return [step * index for index in range(int(end / step) + 1)]


def _curve_words(curve: Curve) -> str:
    (start, before), (stop, after) = curve.points[0], curve.points[-1]
    return f"{curve.domain}: {before:.4f} nats per token at version {start}, {after:.4f} at version {stop}"


def _interval_words(item: Measurement) -> str:
    return f"{item.validator}: {item.effect:+.4f}, between {item.low:+.4f} and {item.high:+.4f} nats per token"


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(text)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def _svg(width: float, height: float, parts: Iterable[Markup]) -> Markup:
    open_ = Markup('<svg role="img" viewBox="0 0 {w} {h}" width="{w}" height="{h}">').format(w=width, h=height)
    return open_ + Markup("").join(parts) + Markup("</svg>")
