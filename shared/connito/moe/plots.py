"""Draw a selection and its diagnostics as heatmaps (SVG)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from connito.moe.diagnostics import coactivation, domain_entropy, overlaps
from connito.moe.statistics import FloatArray, RoutingStatistics
from connito.render import svg

if TYPE_CHECKING:
    from connito.moe.selection import Selection

# Colours run from nearly white to dark blue; selected cells get a frame.
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
    """Return the token score by layer and expert, a panel a domain on one colour scale; selected experts are framed."""
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
    """Return [layers, most experts of a layer]; cells that a layer does not have are NaN."""
    out = np.full((len(rows), max(map(len, rows.values()))), np.nan)
    for place, index in enumerate(sorted(rows)):
        out[place, : len(rows[index])] = rows[index]
    return out


def _framed(selection: Selection, rows: Sequence[int]) -> set[tuple[int, int]]:
    return {(rows.index(i), e) for i, experts in selection.layers.items() if i in rows for e in experts}


def _panel(
    title: str,
    table: FloatArray,
    rows: Sequence[Any],
    framed: set[tuple[int, int]],
    *,
    columns: Sequence[str] = (),
    numbers: bool = False,
    top: float = 0.0,
) -> tuple[float, str]:
    """Return (height, SVG) of one heatmap. `top`: the value of the darkest colour, 0 for the largest there is."""
    count, width = table.shape
    top = top or float(np.nanmax(table, initial=0.0)) or 1.0
    across = (_WIDTH - _LEFT - 12) / max(width, 4)
    down = min(across, 26.0) if not numbers else 40.0
    grid = [
        (
            str(label),
            [
                svg.Cell(column, f"{label}, {column}: {value:.4f}", _look(value / top, (row, column) in framed))
                for column, value in enumerate(table[row].tolist())
                if not np.isnan(value)
            ],
        )
        for row, label in enumerate(rows)
    ]
    parts = [svg.text(_LEFT, 14, f"{title} (darkest {top:.3g})", fill=svg.DIM)]
    parts += svg.cells(grid, (_LEFT, 22), (across, down))
    for row, column in np.argwhere(~np.isnan(table)) if numbers else ():
        ink = "#ffffff" if table[row, column] > top / 2 else svg.INK
        middle = _LEFT + (column + 0.5) * across, 22 + (row + 0.5) * down + 4
        parts.append(svg.text(*middle, f"{table[row, column]:.2f}", "middle", fill=ink))
    height = 30 + count * down
    parts += [
        svg.text(_LEFT + (column + 0.5) * across, height + 8, label, "middle") for column, label in enumerate(columns)
    ]
    return height + (20 if columns else 6), "\n".join(parts)


def _look(share: float, framed: bool) -> svg.Look:
    share = min(1.0, max(0.0, share))
    red, green, blue = (round(low + (high - low) * share) for low, high in zip(_LOW, _HIGH, strict=True))
    frame: svg.Look = {"stroke": _FRAME, "stroke_width": 1.5} if framed else {}
    return {"fill": f"rgb({red},{green},{blue})", **frame}


def _page(title: str, panels: Sequence[tuple[float, str]]) -> str:
    parts, offset = [], float(_TOP)
    for tall, drawn in panels:
        parts.append(svg.element("g", drawn, transform=f"translate(0 {offset:.0f})"))
        offset += tall
    return svg.figure(_WIDTH, round(offset) + 8, title, parts)
