"""Draw `loss.svg`: the target's held-out loss by model version, and the change of every domain beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from connito.render import formats, svg

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 760, 300, 58, 250


def loss_svg(report: dict[str, Any]) -> str:
    """Return two panels over model versions, in nats per token: the target's loss, and every domain's change."""
    cycles = report["cycles"]
    domains = list(cycles[0]["domains"]) if cycles else []
    if domains:
        series = {name: _series(cycles, name) for name in domains}
        changes = {name: [value - line[0] for value in line] for name, line in series.items()}
        target = {domains[0]: series[domains[0]]}
        parts = _panel((60, 370), f"{domains[0]}, nats per token", target, values=True)
        parts += _panel((450, 650), "change by domain, nats per token", changes, values=False)
    else:
        parts = [svg.text(20, 60, "No cycle has ended yet.")]
    return svg.figure(_WIDTH, _HEIGHT, f"{report['run']}: held-out loss by model version", parts)


def _series(cycles: Sequence[dict[str, Any]], domain: str) -> list[float]:
    first = cycles[0]["domains"][domain]["before"]
    return [first, *(cycle["domains"][domain]["after"] for cycle in cycles)]


def _panel(sides: tuple[int, int], title: str, lines: dict[str, list[float]], *, values: bool) -> list[str]:
    """Return one panel: axes, one line a series, and the value at each point or else the name at each line's end."""
    left, right = sides
    count = len(next(iter(lines.values())))
    x = svg.Scale(0, max(1, count - 1), left, right)
    y = svg.Scale(*svg.padded((value for line in lines.values() for value in line), 0.15), _BOTTOM, _TOP)
    parts = [svg.text(left, _TOP - 12, title, fill=svg.DIM)]
    for tick, label in y.ticks():
        parts.append(svg.line((left, y(tick)), (right, y(tick)), stroke=svg.FAINT))
        parts.append(svg.text(left - 6, y(tick) + 4, label, "end", fill=svg.DIM))
    parts += [svg.text(x(i), _BOTTOM + 18, str(i or "base"), "middle", fill=svg.DIM) for i in range(count)]
    labels = {} if values else svg.spread({name: y(line[-1]) for name, line in lines.items()})
    for order, (name, line) in enumerate(lines.items()):
        colour, points = svg.PALETTE[order % len(svg.PALETTE)], [(x(i), y(value)) for i, value in enumerate(line)]
        parts.append(svg.polyline(points, fill="none", stroke=colour, stroke_width=1.5 if order else 2.5))
        parts += [svg.dot(*point, 3, fill=colour) for point in points]
        if values:
            marked = zip(points, line, strict=True)
            parts += [svg.text(at, height - 9, formats.loss(value), "middle") for (at, height), value in marked]
        else:
            parts.append(svg.text(right + 10, labels[name] + 4, name, fill=colour))
    return parts
