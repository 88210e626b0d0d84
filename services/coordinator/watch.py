"""Which windows are open now, for alerts: a window that nobody closes is seen before a miner complains."""

from __future__ import annotations

from connito.runtime import metrics
from connito.wire.facts import RunFacts
from connito.wire.subjects import WINDOWS

from .status import open_window


class OpenWindows:
    """Keeps the gauges of the oldest open window of each kind. Every replica does, leading or not."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, float, float]] = {}
        self._report()

    def notice(self, facts: RunFacts) -> None:
        """Look at a run after one of its windows was opened or closed, or after its end."""
        window = "" if facts.ended is not None else open_window(facts)
        opened = facts.fact(window, facts.cycle, "opened") if window else None
        message = facts.opened(window, facts.cycle) if window else None
        if opened is None or message is None:
            self._open.pop(facts.run, None)
        else:
            self._open[facts.run] = (window, opened.time_unix_ms / 1000, message.deadline_unix_ms / 1000)
        self._report()

    def _report(self) -> None:
        for window in WINDOWS:
            mine = [(opened, deadline) for kind, opened, deadline in self._open.values() if kind == window]
            metrics.WINDOW_OPENED.labels(window).set(min((opened for opened, _ in mine), default=0))
            metrics.WINDOW_DEADLINE.labels(window).set(min((deadline for _, deadline in mine if deadline), default=0))
