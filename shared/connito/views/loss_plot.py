"""`loss.svg`: how the target's held-out loss fell, and what happened to everything else meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT = 760, 300
_TOP, _BOTTOM = 58, 250
_TARGET, _OTHERS = "#0b6e99", ("#b26a00", "#7a4fa3", "#3c7d3c", "#a33b4f", "#66707a")


def loss_svg(report: dict[str, Any]) -> str:
    """Two panels over model versions, in nats per token: the target's loss, and every general domain's change."""
    cycles = report["cycles"]
    domains = list(cycles[0]["domains"]) if cycles else []
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    title = f"{escape(report['run'])}: held-out loss by model version"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="20" y="24" font-size="15" font-weight="600">{title}</text>',
    ]
    if not domains:
        parts.append('<text x="20" y="60">No cycle has ended yet.</text>')
    else:
        target = _series(cycles, domains[0])
        parts += _panel(60, 370, f"{domains[0]}, nats per token", {domains[0]: target}, (_TARGET,), values=True)
        changes = {name: _changes(_series(cycles, name)) for name in domains}
        parts += _panel(450, 650, "change by domain, nats per token", changes, (_TARGET, *_OTHERS), labels=True)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _series(cycles: Sequence[dict[str, Any]], domain: str) -> list[float]:
    first = cycles[0]["domains"][domain]["before"]
    return [first, *(cycle["domains"][domain]["after"] for cycle in cycles)]


def _changes(series: Sequence[float]) -> list[float]:
    return [value - series[0] for value in series]


def _panel(
    left: int,
    right: int,
    title: str,
    lines: dict[str, list[float]],
    colours: Sequence[str],
    *,
    values: bool = False,
    labels: bool = False,
) -> list[str]:
    """One panel: axis, a line a series, a value at each point or a name at each end."""
    everything = [value for line in lines.values() for value in line]
    low, high = min(everything), max(everything)
    margin = (high - low) * 0.15 or 0.01
    low, high = low - margin, high + margin
    count = len(next(iter(lines.values())))

    def x(index: int) -> float:
        return left + (right - left) * index / max(1, count - 1)

    def y(value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low)

    parts = [f'<text x="{left}" y="{_TOP - 12}" fill="#555">{escape(title)}</text>']
    for step in range(5):
        tick = low + (high - low) * step / 4
        parts.append(f'<line x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#e4e7ea"/>')
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="#777">{tick:.3f}</text>')
    for index in range(count):
        parts.append(
            f'<text x="{x(index):.1f}" y="{_BOTTOM + 18}" text-anchor="middle" fill="#777">{index or "base"}</text>'
        )
    names = _spread({name: y(line[-1]) for name, line in lines.items()}) if labels else {}
    for order, (name, line) in enumerate(lines.items()):
        colour = colours[order % len(colours)]
        points = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in enumerate(line))
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{2.5 if order == 0 else 1.5}"/>'
        )
        for index, value in enumerate(line):
            parts.append(f'<circle cx="{x(index):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>')
            if values:
                parts.append(f'<text x="{x(index):.1f}" y="{y(value) - 9:.1f}" text-anchor="middle">{value:.4f}</text>')
        if labels:
            parts.append(f'<text x="{right + 10}" y="{names[name] + 4:.1f}" fill="{colour}">{escape(name)}</text>')
    return parts


def _spread(positions: dict[str, float], gap: float = 14.0) -> dict[str, float]:
    """Push labels apart so that none covers another."""
    placed: dict[str, float] = {}
    last = float("-inf")
    for name, position in sorted(positions.items(), key=lambda item: item[1]):
        last = placed[name] = max(position, last + gap)
    return placed
