"""Which windows are open now, for alerts: a window that nobody closes is seen before a miner complains."""

from __future__ import annotations

from connito.runtime import metrics
from connito.wire.facts import RunFacts
from connito.wire.subjects import WINDOWS


class OpenWindows:
    """Keeps the gauges of the oldest open window of each kind. Every replica does, leading or not."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, float, float]] = {}
        self._report()

    def notice(self, facts: RunFacts) -> None:
        """Look at a run after one of its windows was opened or closed, or after its end."""
        window = facts.open_window if facts.ended is None else None
        opened = None if window is None else window.opened_fact
        if window is None or opened is None:
            self._open.pop(facts.run, None)
        else:
            self._open[facts.run] = (window.name, opened.time_unix_ms / 1000, window.deadline_unix_ms / 1000)
        self._report()

    def _report(self) -> None:
        for window in WINDOWS:
            mine = [(opened, deadline) for kind, opened, deadline in self._open.values() if kind == window]
            metrics.WINDOW_OPENED.labels(window).set(min((opened for opened, _ in mine), default=0))
            metrics.WINDOW_DEADLINE.labels(window).set(min((deadline for _, deadline in mine if deadline), default=0))
