"""Experts layer by layer: which were selected, from the log, and figures about them, from what it names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Cell:
    """An expert. `rank` is its place among its layer's selected ones (1 is best); 0: not selected."""

    expert: int
    rank: int
    helper: bool

    @property
    def words(self) -> str:
        """Return the cell in words, for screen readers."""
        if self.rank:
            return f"expert {self.expert}: selected, number {self.rank} of its layer"
        return f"expert {self.expert}: {'frozen helper' if self.helper else 'not selected'}"


@dataclass(frozen=True)
class Heatmap:
    """Rows of cells by layer, `columns` wide: as far as the selection reaches. How many experts a layer has in all is in
    the base's manifest, not in the log; layers without a selected expert are not named there either."""

    layers: tuple[tuple[int, tuple[Cell, ...]], ...]
    columns: int
    selected: int
    total: int
    target_parameters: int
    model_parameters: int
    deepest_rank: int
    report: str

    def experts(self) -> dict[int, list[int]]:
        """Return the selected experts by layer."""
        return {layer: [cell.expert for cell in cells if cell.rank] for layer, cells in self.layers}


@dataclass(frozen=True)
class FigureMap:
    """A figure for each expert that has one: rows by layer, `columns` wide, `highest` the largest of all."""

    what: str
    layers: tuple[tuple[int, tuple[tuple[int, float], ...]], ...]
    columns: int
    highest: float

    @property
    def leaders(self) -> tuple[tuple[int, int, float], ...]:
        """Return (layer, expert, figure) of the three largest."""
        cells = [(layer, expert, figure) for layer, row in self.layers for expert, figure in row]
        return tuple(sorted(cells, key=lambda cell: (-cell[2], cell[:2]))[:3])


def figure_map(what: str, figures: Mapping[int, Mapping[int, float]]) -> FigureMap:
    """Return figures by layer and expert, to be drawn."""
    layers = tuple((layer, tuple(sorted(row.items()))) for layer, row in sorted(figures.items()))
    cells = [(expert, figure) for _, row in layers for expert, figure in row]
    return FigureMap(
        what=what,
        layers=layers,
        columns=max((expert for expert, _ in cells), default=-1) + 1,
        highest=max((figure for _, figure in cells), default=0.0),
    )


def heatmap(facts: RunFacts) -> Heatmap | None:
    """Return the selection; None before it is made."""
    selection = facts.selection
    if selection is None:
        return None
    seen = [expert for layer in selection.layers for expert in (*layer.experts, *layer.helpers)]
    columns = max(seen, default=-1) + 1
    layers = []
    for layer in sorted(selection.layers, key=lambda layer: layer.layer):
        ranks = {expert: place for place, expert in enumerate(layer.experts, start=1)}
        helpers = set(layer.helpers)
        cells = tuple(Cell(expert, ranks.get(expert, 0), expert in helpers) for expert in range(columns))
        layers.append((layer.layer, cells))
    return Heatmap(
        layers=tuple(layers),
        columns=columns,
        selected=selection.selected_experts,
        total=selection.total_experts,
        target_parameters=selection.target_parameters,
        model_parameters=selection.model_parameters,
        deepest_rank=max((len(layer.experts) for layer in selection.layers), default=0),
        report=selection.report.digest,
    )
