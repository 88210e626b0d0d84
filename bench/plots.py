"""Axes to draw on, and the file they end up in. One place, so that every figure looks alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZE = (4.2, 3.2)


@contextmanager
def axes(path: Path, panels: int = 1) -> Iterator[list[Any]]:
    """`panels` matplotlib axes side by side; on leaving, the figure is written to `path` (SVG)."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE[0] * panels, SIZE[1]), layout="constrained")
    drawn = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    yield drawn
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def bars(axis: Any, values: dict[str, tuple[float, float, float]], label: str) -> None:
    """One horizontal bar per name, (mean, low, high) with the interval as a whisker; the first name on top."""
    names = list(values)[::-1]
    means = [values[name][0] for name in names]
    below = [max(0.0, values[name][0] - values[name][1]) for name in names]
    above = [max(0.0, values[name][2] - values[name][0]) for name in names]
    axis.barh(names, means, xerr=[below, above], color="#5b7fa6", ecolor="#333333", capsize=3)
    axis.set_xlabel(label)
