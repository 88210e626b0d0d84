"""Draw `proof.svg`: what base and result get right of held-out text, before and after, with the interval of the change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from connito.render import svg

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 760, 330, 640, 64, 30


@dataclass(frozen=True)
class Row:
    """Shares that are right before and after, and the change with its interval, over `count` words or tasks of `texts` texts."""

    domain: str
    use: str
    what: str
    before: float
    after: float
    change: float
    low: float
    high: float
    count: int
    texts: int


def proof_svg(run: str, rows: Sequence[Row]) -> str:
    """Return one line a row: from where it was to where it is, in per cent of what was asked."""
    most = max(
        [0.05, *(value for row in rows for value in (row.before, row.after, row.before + row.high) if value < 2)]
    )
    x = svg.Scale(0, 100 * most * 1.05, _LEFT, _RIGHT)
    bottom = _TOP + _ROW * len(rows)
    parts = [
        svg.text(_LEFT, _TOP - 14, "right, per cent: before ○, after ●, and the interval of the change", fill=svg.DIM)
    ]
    for tick, label in x.ticks():
        parts.append(svg.line((x(tick), _TOP), (x(tick), bottom), stroke=svg.FAINT))
        parts.append(svg.text(x(tick), bottom + 18, label, "middle", fill=svg.DIM))
    for number, row in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        colour = svg.PALETTE[0] if row.use == "target" else svg.DIM
        low, high = (max(0.0, row.before + bound) for bound in (row.low, row.high))
        parts.append(svg.text(_LEFT - 12, y + 4, f"{row.domain}: {row.what}", "end", fill=colour))
        if high - low < 2:
            parts.append(svg.line((x(100 * low), y), (x(100 * high), y), stroke=colour, stroke_width=5, opacity=0.3))
        parts.append(svg.line((x(100 * row.before), y), (x(100 * row.after), y), stroke=colour, stroke_width=2))
        parts.append(svg.dot(x(100 * row.before), y, 4, fill="none", stroke=colour))
        parts.append(svg.dot(x(100 * row.after), y, 4, fill=colour))
        parts.append(svg.text(_RIGHT + 14, y + 4, f"{100 * row.change:+.1f} points", fill=colour))
    return svg.figure(_WIDTH, bottom + 34, f"{run}: what is right of held-out text", parts)
