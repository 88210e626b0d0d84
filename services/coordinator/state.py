"""Keep what the coordinator knows of every run: its facts, its open windows for alerts, and who waits for news of it."""

from __future__ import annotations

import asyncio
from typing import Any

from connito.bus.position import PositionedLog
from connito.protocol import rules
from connito.protocol.entitlement import Naming
from connito.protocol.quorum import Pause
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.v1 import cycle_pb2
from connito.wire.enums import plain_name
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.heads import LogTrees
from connito.wire.roster import Roster
from connito.wire.subjects import WINDOWS
from connito.wire.window import Window

from .deadlines import window_ms

log = get_logger("coordinator")


class State(PositionedLog):
    """The facts of every run, and how far each stream was read. `notice` is the engine's hook."""

    def __init__(self, roster: Roster) -> None:
        super().__init__(roster, LogTrees())
        self.changes, self.naming, self._windows = Changes(), Naming(), OpenWindows()

    def apply(self, record: Record) -> Fact | None:
        """Apply a record as `PositionedLog.apply` does; what miners commit to and reveal is the committer's to read, whatever is
        in it, and counts here by its answer.
        """
        if record.stream == "INGRESS" and not record.subject.endswith(".trained"):
            self.read(record)
            return None
        return super().apply(record)

    def notice(self, fact: Fact, *, live: bool) -> None:
        """Take over a fact that has just been applied; `live` when it was not there before this process."""
        if isinstance(fact.message, cycle_pb2.ScoreReport):
            # The losses are for the aggregator; here it matters only who reported.
            fact.message.ClearField("scores")
        self.naming.add(fact)
        self.changes.notice(fact)
        facts, kind = self.runs[fact.run], fact.key.kind
        if kind in ("opened", "closed", "ended"):
            self._windows.notice(facts)
        if kind in ("head", "cosigned", "ended"):
            _audited(facts)
        if kind in ("version", "ended"):
            _gated(facts)
        if kind == "closed" and live:
            _observe(facts, facts.window(fact.key.section, fact.key.cycle))

    def recall(self, run: str, note: dict[str, Any]) -> None:
        """Take up what is kept of a run."""
        super().recall(run, note)
        self.naming.recall(run, note.get("naming", ()))
        if (facts := self.runs.get(run)) is not None:
            self._windows.notice(facts)
            _audited(facts)
            _gated(facts)

    def note(self, run: str) -> dict[str, Any]:
        """Return what is to be kept of a run."""
        return super().note(run) | {"naming": self.naming.of(run)}

    def paused(self, run: str, here: Pause | None) -> None:
        """Take over that a run waits for more people than are `here`, or that it does not."""
        if self._windows.pause(run, here is not None):
            if here is None:
                if run in self.runs:
                    self._windows.notice(self.runs[run])
                log.info("the run goes on", run=run)
            else:
                log.warning(f"the run is paused: {here}", run=run)


def _observe(facts: RunFacts, window: Window) -> None:
    """Count the length of a window that was closed."""
    length, closed = window_ms(facts, window), window.closed
    if length is not None and closed is not None:
        cause = plain_name(cycle_pb2.CloseCause, closed.cause).replace("-", "_")
        metrics.WINDOW_SECONDS.labels(window.name, cause).observe(length / 1000)


def _audited(facts: RunFacts) -> None:
    """Show how many heads no validator has cosigned; nothing of a run that is over and whole."""
    last = facts.next_head - 1
    if facts.head(last) is None:
        return
    waiting = next((behind for behind in range(last) if facts.cosigned(last - behind)), last)
    metrics.UNAUDITED_CYCLES.labels(facts.run).set(waiting)
    if facts.ended is not None and not waiting:
        metrics.UNAUDITED_CYCLES.remove(facts.run)


def _gated(facts: RunFacts) -> None:
    """Show how many merged versions in a row the gate refused; nothing of a run that is over."""
    kept, merged = cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, 0
    for version in filter(None, map(facts.version, reversed(facts.cycles()))):
        if version.gate not in (kept, cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE):
            break
        merged += version.gate == kept
    metrics.KEPT_INCUMBENT_CYCLES.labels(facts.run).set(merged)
    if facts.ended is not None:
        metrics.KEPT_INCUMBENT_CYCLES.remove(facts.run)


class Changes:
    """Take an event with `of`, look at the facts, and if they do not satisfy yet, wait for the event.

    In that order nothing is missed: a fact that arrives between looking and waiting has set the event.
    """

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def of(self, run: str) -> asyncio.Event:
        """Set at the next fact of `run`."""
        return self._events.setdefault(run, asyncio.Event())

    def notice(self, fact: Fact) -> None:
        """Handle a new fact; called by the engine."""
        event = self._events.pop(fact.run, None)
        if event is not None:
            event.set()


class OpenWindows:
    """Keeps the gauges of the oldest open window of each kind. Every replica does, leading or not."""

    def __init__(self) -> None:
        self._open: dict[str, tuple[str, float, float]] = {}
        self._paused: set[str] = set()
        self._report()

    def notice(self, facts: RunFacts) -> None:
        """Take over a run after one of its windows was opened or closed, or after its end."""
        window = facts.open_window if facts.ended is None else None
        opened = None if window is None else window.opened_fact
        if window is None or opened is None:
            self._open.pop(facts.run, None)
        else:
            self._open[facts.run] = (window.name, opened.time_unix_ms / 1000, rules.due_ms(facts, window) / 1000)
        self._report()

    def pause(self, run: str, paused: bool) -> bool:
        """Take over whether a run is paused: then its window is not overdue. Return whether that is new."""
        if paused == (run in self._paused):
            return False
        self._paused ^= {run}
        if paused:
            metrics.RUN_PAUSED.labels(run).set(1)
        else:
            metrics.RUN_PAUSED.remove(run)
        self._report()
        return True

    def _report(self) -> None:
        for window in WINDOWS:
            mine = [
                (opened, 0.0 if run in self._paused else deadline)
                for run, (kind, opened, deadline) in self._open.items()
                if kind == window
            ]
            metrics.WINDOW_OPENED.labels(window).set(min((opened for opened, _ in mine), default=0))
            metrics.WINDOW_DEADLINE.labels(window).set(min((deadline for _, deadline in mine if deadline), default=0))
