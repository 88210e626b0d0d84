"""Draw the figures of an expert's card from its record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from connito.library.schema import ExpertRecord, Loss
from connito.render import formats, svg

_COLOURS = {True: svg.BETTER, False: svg.FAINT}
LOSSES, EXPERTS = "losses.svg", "experts.svg"
# Of the picture of experts; the largest models have a tenth of it.
MOST_CELLS, _DIGITS = 1 << 18, 6
_WIDTH, _ROW, _LEFT, _RIGHT, _TOP = 720, 26, 170, 90, 40


def plots(record: ExpertRecord) -> dict[str, str]:
    """Return SVG by file name: the change of the loss on every domain, and the experts that the record holds."""
    drawn = {}
    rows = [row for row in record.get("losses", []) if row.get("before") is not None and row.get("after") is not None]
    if rows:
        drawn[LOSSES] = _changes(rows, str(record.get("domain", "")))
    if _drawable(layers := record.get("selection", {}).get("layers") or {}):
        drawn[EXPERTS] = _grid(layers)
    return drawn


def _drawable(layers: Mapping[str, Sequence[int]]) -> bool:
    """Return whether these are layers and experts of some model: of one that a stranger deposited, only its files are checked."""
    if not layers or not all(layer.isdecimal() and len(layer) <= _DIGITS for layer in layers):
        return False
    experts = [expert for chosen in layers.values() for expert in chosen]
    return min(experts, default=0) >= 0 and len(layers) * (1 + max(experts, default=0)) <= MOST_CELLS


def _changes(rows: Sequence[Loss], own: str) -> str:
    """Return one bar a domain with its interval; to the left is better."""
    spans = [_span(row) for row in rows]
    reach = max(abs(value) for span in spans for value in span) or 1e-6
    x = svg.Scale(-reach, reach, _LEFT, _WIDTH - _RIGHT)
    bottom = _TOP + _ROW * len(rows)
    parts = [svg.line((x(0), _TOP - 6), (x(0), bottom), stroke=svg.DIM)]
    for place, (row, (low, mean, high)) in enumerate(zip(rows, spans, strict=True)):
        y = _TOP + _ROW * place
        weight = "600" if row["domain"] == own else "400"
        colour = svg.BETTER if mean <= 0 else svg.WORSE
        parts += [
            svg.text(_LEFT - 10, y + 15, str(row["domain"]), "end", font_weight=weight),
            svg.bar((x(0), x(mean)), y + 3, _ROW - 12, fill=colour, opacity=0.75),
            svg.text(_WIDTH - _RIGHT + 8, y + 15, formats.change(mean)),
        ]
        if low < high:
            centre = y + _ROW / 2 - 3
            parts.append(svg.line((x(low), centre), (x(high), centre), stroke=svg.INK))
    heading = "Change of held-out loss, nats per token (left is better; 95 % interval)"
    return svg.figure(_WIDTH, bottom + 12, heading, parts)


def _span(row: Loss) -> tuple[float, float, float]:
    mean = (row["after"] or 0.0) - (row["before"] or 0.0)
    return row.get("change_low", mean), mean, row.get("change_high", mean)


def _grid(layers: Mapping[str, Sequence[int]]) -> str:
    """Return a row a layer and a column an expert, filled where the record has that expert."""
    chosen = {layer: set(map(int, layers[layer])) for layer in sorted(layers, key=int)}
    count = 1 + max((max(experts) for experts in chosen.values() if experts), default=0)
    rows = [
        (f"layer {layer}", [svg.Cell(e, f"expert {e}", {"fill": _COLOURS[e in experts]}) for e in range(count)])
        for layer, experts in chosen.items()
    ]
    across = max(3.0, min(22.0, (_WIDTH - _LEFT - 20) / count))
    drawn = svg.cells(rows, (_LEFT, _TOP), (across, 22), gap=across * 0.14)
    return svg.figure(_WIDTH, _TOP + 22 * len(rows) + 12, "Experts by layer", list(drawn))
