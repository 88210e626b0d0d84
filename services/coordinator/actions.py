"""Decide only while leading, and perform what was decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from connito.bus import Bus
from connito.bus.position import PositionedLog
from connito.protocol.bans import banned
from connito.protocol.quorum import Pause, pause
from connito.runtime import logs
from connito.runtime.logs import get_logger
from connito.service.engine import Action, Decision
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.enums import plain_name, reason_name
from connito.wire.facts import RunFacts
from connito.wire.subjects import window_value
from google.protobuf.message import Message

from . import handlers
from .handlers import CloseWindow, PublishFact, WriteHead

log = get_logger("coordinator")

# What decisions rest on.
STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE", "LIBRARY", "INGRESS")
# What the content of a fact rests on, where that is less: whom an opening names and how long
# such windows took, who acted before a close or a draw. That a
# window is opened, closed or settled already needs no looking up: the broker admits each fact once.
RESTS_ON = {
    ("run", "stake"): ("RUNS",),
    ("train", "opened"): ("RUNS", "TRAIN", "COMMIT", "VALIDATE", "MERGE"),
    ("train", "closed"): ("RUNS", "TRAIN", "INGRESS"),
    ("commit", "opened"): ("RUNS", "COMMIT", "INGRESS"),
    ("commit", "closed"): ("RUNS", "COMMIT", "INGRESS"),
    ("submit", "opened"): ("RUNS", "COMMIT", "SUBMIT"),
    ("submit", "closed"): ("RUNS", "COMMIT", "SUBMIT", "INGRESS"),
    ("validate", "opened"): ("RUNS", "TRAIN", "VALIDATE"),
    ("validate", "drawn"): ("RUNS", "TRAIN", "VALIDATE", "MERGE"),
    ("validate", "closed"): ("RUNS", "TRAIN", "VALIDATE", "MERGE"),
    ("merge", "opened"): ("RUNS",),
    ("merge", "closed"): ("RUNS", "MERGE"),
}


def rests_on(payload: object) -> Sequence[str]:
    """Return the streams that have to be read to their ends before an action is decided for good."""
    match payload:
        case PublishFact(section, _, kind, _):
            return RESTS_ON.get((section, kind), STREAMS)
        case CloseWindow(window, _, _, _):
            return RESTS_ON[window, "closed"]
    return STREAMS


class Coordinator:
    """`decide` and `perform` are the engine's. Both do nothing on a replica that does not lead.

    `clock` is the broker's, in Unix milliseconds. `run` limits it to one run; empty: every run.
    `paused(run, who is there)` is told at every decision whether a run waits for more people.
    """

    def __init__(
        self,
        bus: Bus,
        facts: PositionedLog,
        leading: Callable[[], bool],
        clock: Callable[[], int],
        run: str = "",
        paused: Callable[[str, Pause | None], None] = lambda run, here: None,
    ) -> None:
        self._bus, self._facts, self._leading, self._clock, self._run = bus, facts, leading, clock, run
        self._paused = paused

    def decide(self, facts: RunFacts, now_ms: int) -> Decision:
        """Return the decision of `handlers.decide`; without its actions while another replica leads."""
        if self._run not in ("", facts.run):
            return Decision()
        stake = self._facts.roster.stake
        self._paused(facts.run, pause(facts, now_ms, stake))
        decision = handlers.decide(facts, now_ms, stake)
        return decision if self._leading() else Decision((), decision.wake_at_ms)

    async def perform(self, action: Action) -> None:
        """Decide once more on all that the broker has by now, and do it if it is still the same action.

        One stream may have been read less far than another; who is expected, and whether everyone acted, must not
        depend on that. Raises `Retry` when the broker is away.
        """
        await self._facts.refresh(self._bus, rests_on(action.payload))
        again = self.decide(self._facts.runs[action.run], self._clock())
        for confirmed in again.actions:
            if confirmed.key == action.key:
                await self._do(confirmed)

    async def _do(self, action: Action) -> None:
        match action.payload:
            case PublishFact(section, cycle, kind, message, id_):
                if (section, kind) == ("train", "opened"):
                    # A cycle is a trace: one of a whole run would have no end.
                    logs.use("")
                await self._publish(action.run, section, cycle, kind, message, id_)
            case CloseWindow():
                await self._close(action.run, action.payload)
            case WriteHead(number):
                await self._publish(action.run, "run", number, "head", self._head(action.run, number))

    def _head(self, run: str, number: int) -> run_pb2.LogHead:
        """Return the signed head over what was read. Raises `Invalid` when a head before it is not of that log."""
        facts, trees = self._facts.runs[run], self._facts.trees
        assert trees is not None
        if number > 1:
            trees.checkpoint(facts, number - 1)
        return trees.of(run).head(facts, self._bus.identity)

    async def _close(self, run: str, close: CloseWindow) -> None:
        """Close a window behind everything that was read for the decision: what the broker had just before it, or more. Bans in
        RUNS up to there apply to it.
        """
        bans_until = self._facts.position("RUNS")
        message = cycle_pb2.WindowClosed(
            run=run,
            cycle=close.cycle,
            window=window_value(close.window),
            stream=close.stream,
            last_sequence=self._facts.position(close.stream),
            cause=close.cause,
            runs_sequence=bans_until,
            banned=sorted(banned(self._facts.runs[run], bans_until)),
        )
        await self._publish(run, close.window, close.cycle, "closed", message)

    async def _publish(self, run: str, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> None:
        if not self._leading():
            # Whoever leads now has decided on the same facts; what is written late would only be refused.
            return
        if await self._bus.publish_fact(run, section, cycle, kind, message, id_):
            self._report(run, section, cycle, kind, message)

    def _report(self, run: str, section: str, cycle: int, kind: str, message: Message) -> None:
        extra: dict[str, object] = {}
        if isinstance(message, cycle_pb2.WindowClosed):
            extra["cause"] = plain_name(cycle_pb2.CloseCause, message.cause).replace("-", "_")
        if isinstance(message, run_pb2.RunEnded):
            outcome = plain_name(run_pb2.RunOutcome, message.outcome)
            extra |= {"outcome": outcome, "reason": reason_name(message.reason), "detail": message.detail}
        log.info(f"{section} {kind}", run=run, cycle=cycle, **extra)
