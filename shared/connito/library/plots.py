"""The card's plots, as SVG made by hand: the library's image has no drawing package, and the record is all that is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Record = Mapping[str, Any]
LOSSES, EXPERTS = "losses.svg", "experts.svg"
_WIDTH, _ROW, _LEFT, _RIGHT = 720, 26, 170, 90
_BETTER, _WORSE, _INK, _FAINT = "#0b6e99", "#b24a3a", "#222222", "#e4e7ea"


def plots(record: Record) -> dict[str, str]:
    """SVG by file name: the change of the loss on every domain, and which experts the record is of."""
    drawn = {}
    rows = [row for row in record.get("losses", []) if row.get("before") is not None and row.get("after") is not None]
    if rows:
        drawn[LOSSES] = _changes(rows, str(record.get("domain", "")))
    if record.get("selection", {}).get("layers"):
        drawn[EXPERTS] = _grid(record["selection"]["layers"])
    return drawn


def _svg(height: int, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}"><rect width="100%" height="100%" fill="#fff"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def _changes(rows: Sequence[Mapping[str, Any]], own: str) -> str:
    """One bar a domain with its interval; to the left is better."""
    spans = [_span(row) for row in rows]
    reach = max(max(abs(low), abs(high), abs(mean)) for low, mean, high in spans) or 1e-6
    middle, half = (_LEFT + _WIDTH - _RIGHT) / 2, (_WIDTH - _RIGHT - _LEFT) / 2

    def x(value: float) -> float:
        return middle + half * value / reach

    bottom = 34 + _ROW * len(rows)
    parts = [
        '<text x="12" y="20" font-weight="600">Change of held-out loss, nats per token (left is better; 95 % interval)</text>',
        f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="28" y2="{bottom}" stroke="#999"/>',
    ]
    for place, (row, (low, mean, high)) in enumerate(zip(rows, spans, strict=True)):
        y = 34 + _ROW * place
        name, weight = escape(str(row["domain"])), "600" if row["domain"] == own else "400"
        colour = _BETTER if mean <= 0 else _WORSE
        left, width = min(x(mean), middle), abs(x(mean) - middle)
        centre = y + _ROW / 2 - 3
        parts += [
            f'<text x="{_LEFT - 10}" y="{y + 15}" text-anchor="end" font-weight="{weight}">{name}</text>',
            f'<rect x="{left:.1f}" y="{y + 3}" width="{width:.1f}" height="{_ROW - 12}" fill="{colour}" opacity="0.75"/>',
            f'<text x="{_WIDTH - _RIGHT + 8}" y="{y + 15}">{mean:+.4f}</text>',
        ]
        if (low, high) != (mean, mean):
            parts.append(
                f'<line x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{centre:.1f}" y2="{centre:.1f}" stroke="{_INK}"/>'
            )
    return _svg(bottom + 12, parts)


def _span(row: Mapping[str, Any]) -> tuple[float, float, float]:
    mean = float(row["after"]) - float(row["before"])
    return float(row.get("change_low", mean)), mean, float(row.get("change_high", mean))


def _grid(layers: Mapping[str, Sequence[int]]) -> str:
    """A row a layer and a column an expert; filled where the record has that expert."""
    order = sorted(layers, key=int)
    last = max((max(map(int, layers[layer])) for layer in order if layers[layer]), default=0)
    cell = max(3.0, min(22.0, (_WIDTH - _LEFT - 20) / (last + 1)))
    parts = ['<text x="12" y="20" font-weight="600">Experts by layer</text>']
    for place, layer in enumerate(order):
        y = 34 + 22 * place
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 14}" text-anchor="end">layer {escape(str(layer))}</text>')
        chosen = {int(expert) for expert in layers[layer]}
        for expert in range(last + 1):
            colour = _BETTER if expert in chosen else _FAINT
            parts.append(
                f'<rect x="{_LEFT + cell * expert:.1f}" y="{y}" width="{cell * 0.86:.1f}" height="18" fill="{colour}">'
                f"<title>expert {expert}</title></rect>"
            )
    return _svg(34 + 22 * len(order) + 12, parts)
