"""A selection and its diagnostics as pictures: plain SVG, written by hand so that no plotting library is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from connito.moe.diagnostics import coactivation, domain_entropy, overlaps
from connito.moe.statistics import FloatArray, RoutingStatistics

if TYPE_CHECKING:
    from connito.moe.selection import Selection

# From nearly white to dark blue; selected cells get a frame.
_LOW, _HIGH, _FRAME = (244, 247, 250), (11, 78, 120), "#d1495b"
_WIDTH, _LEFT, _TOP = 760, 92, 46


def write_plots(folder: Path, selection: Selection, domains: Mapping[str, RoutingStatistics]) -> list[Path]:
    """Write the plots that there is data for, and return their paths.

    routing.svg (layer × expert, one panel a domain), overlap.svg (domain × domain), entropy.svg (domain entropy by layer
    and expert), coactivation.svg (one panel a selected layer), causal.svg (effect of removing an expert).
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = {"routing.svg": routing_svg(selection, domains), "coactivation.svg": _coactivation_svg(selection, domains)}
    if len(domains) > 1:
        plots["overlap.svg"] = _overlap_svg(domains)
        plots["entropy.svg"] = _entropy_svg(selection, domains)
    if effects := selection.diagnostics.get("causal_effect"):
        plots["causal.svg"] = _causal_svg(selection, effects)
    for name, content in plots.items():
        (folder / name).write_text(content)
    return [folder / name for name in plots]


def routing_svg(selection: Selection, domains: Mapping[str, RoutingStatistics]) -> str:
    """Token score by layer and expert, a panel a domain on one colour scale; selected experts are framed."""
    tables = {
        name: _table({i: layer.token_score for i, layer in statistics.layers.items()})
        for name, statistics in domains.items()
    }
    rows = sorted(next(iter(domains.values())).layers)
    panels = [_panel(name, table, rows, _framed(selection, rows)) for name, table in tables.items()]
    return _page("Share of routing by layer (down) and expert (across)", panels)


def _overlap_svg(domains: Mapping[str, RoutingStatistics]) -> str:
    names = list(domains)
    panel = _panel("share of routing in common", overlaps(domains), names, set(), columns=names, numbers=True)
    return _page("Overlap between domains", [panel])


def _entropy_svg(selection: Selection, domains: Mapping[str, RoutingStatistics]) -> str:
    rows = sorted(next(iter(domains.values())).layers)
    table = _table({i: domain_entropy([s.layers[i].token_score for s in domains.values()]) for i in rows})
    panel = _panel("0: one domain's expert, 1: everybody's", table, rows, _framed(selection, rows), top=1.0)
    return _page(f"Domain entropy over {', '.join(domains)}", [panel])


def _coactivation_svg(selection: Selection, domains: Mapping[str, RoutingStatistics]) -> str:
    name, target = next(iter(domains.items()))
    panels = []
    for index in sorted(selection.layers):
        table = coactivation(target.layers[index])
        chosen = selection.layers[index]
        frames = {(a, b) for a in chosen for b in chosen if a != b}
        panels.append(_panel(f"layer {index}", table, range(len(table)), frames, top=1.0))
    return _page(f"Co-activation on {name}: chance of the expert across, given the one down", panels)


def _causal_svg(selection: Selection, effects: Mapping[str, Mapping[str, float]]) -> str:
    rows = sorted(int(index) for index in effects)
    width = max(len(selection.scores[i]) for i in rows)
    table = np.full((len(rows), width), np.nan)
    for place, index in enumerate(rows):
        for expert, effect in effects[str(index)].items():
            table[place, int(expert)] = effect
    panel = _panel("nats per token; empty: not measured", table, rows, _framed(selection, rows))
    return _page("Effect of removing an expert, KL(P‖P without it)", [panel])


def _table(rows: Mapping[int, FloatArray]) -> FloatArray:
    """[layers, most experts of a layer]; cells that a layer does not have are NaN."""
    out = np.full((len(rows), max(map(len, rows.values()))), np.nan)
    for place, index in enumerate(sorted(rows)):
        out[place, : len(rows[index])] = rows[index]
    return out


def _framed(selection: Selection, rows: Sequence[int]) -> set[tuple[int, int]]:
    return {(rows.index(i), e) for i, experts in selection.layers.items() if i in rows for e in experts}


def _panel(
    title: str,
    table: FloatArray,
    rows: Iterable[Any],
    framed: set[tuple[int, int]],
    *,
    columns: Sequence[str] | None = None,
    numbers: bool = False,
    top: float = 0.0,
) -> tuple[int, str]:
    """(height, SVG) of one heatmap. `top`: the value of the darkest colour, 0 for the largest there is."""
    count, width = table.shape
    top = top or float(np.nanmax(table, initial=0.0)) or 1.0
    across = (_WIDTH - _LEFT - 12) / max(width, 4)
    down = min(across, 26.0) if not numbers else 40.0
    parts = [f'<text x="{_LEFT}" y="14" fill="#555">{escape(title)} (darkest {top:.3g})</text>']
    for row, label in enumerate(rows):
        middle = 22 + row * down + down / 2 + 4
        parts.append(
            f'<text x="{_LEFT - 8}" y="{middle:.1f}" text-anchor="end" fill="#777">{escape(str(label))}</text>'
        )
        for column in range(width):
            value = table[row, column]
            if not np.isnan(value):
                parts.append(_cell(row, column, float(value), top, (across, down), (row, column) in framed, numbers))
    height = 22 + count * down + 8
    for column, label in enumerate(columns or []):
        middle = _LEFT + (column + 0.5) * across
        parts.append(_middle(middle, height + 8, "#777", escape(label)))
    return int(height + (20 if columns else 6)), "\n".join(parts)


def _cell(
    row: int, column: int, value: float, top: float, size: tuple[float, float], framed: bool, number: bool
) -> str:
    share = min(1.0, max(0.0, value / top))
    red, green, blue = (round(low + (high - low) * share) for low, high in zip(_LOW, _HIGH, strict=True))
    x, y = _LEFT + column * size[0], 22 + row * size[1]
    frame = f' stroke="{_FRAME}" stroke-width="1.5"' if framed else ""
    drawn = (
        f'<rect x="{x + 0.75:.2f}" y="{y + 0.75:.2f}" width="{size[0] - 1.5:.2f}" height="{size[1] - 1.5:.2f}" '
        f'fill="rgb({red},{green},{blue})"{frame}><title>{row}, {column}: {value:.4f}</title></rect>'
    )
    if number:
        drawn += _middle(x + size[0] / 2, y + size[1] / 2 + 4, "#fff" if share > 0.5 else "#222", f"{value:.2f}")
    return drawn


def _middle(x: float, y: float, colour: str, text: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{colour}">{text}</text>'


def _page(title: str, panels: Sequence[tuple[int, str]]) -> str:
    height = _TOP + sum(tall for tall, _ in panels) + 8
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="20" y="26" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    offset = _TOP
    for tall, drawn in panels:
        parts.append(f'<g transform="translate(0 {offset})">\n{drawn}\n</g>')
        offset += tall
    return "\n".join([*parts, "</svg>"]) + "\n"
