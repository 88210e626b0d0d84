"""Deciding only while leading: the lease, its fencing token in every fact, and the performing of what was decided."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from connito.bus import Bus
from connito.bus.lease import Lease
from connito.bus.position import PositionedLog
from connito.errors import Retry, reason_name
from connito.protocol.bans import banned
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.service.engine import Action, Decision, now_ms
from connito.v1 import cycle_pb2, run_pb2
from connito.wire.facts import RunFacts
from connito.wire.subjects import window_value
from google.protobuf.message import Message

from . import handlers
from .actions import CloseWindow, PublishFact
from .deadlines import window_ms

log = get_logger("coordinator")

LEASE = "coordinator"
# What decisions rest on.
STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE", "INGRESS")
_FENCED = (cycle_pb2.WindowOpened, cycle_pb2.WindowClosed, cycle_pb2.SeedDrawn)


class Leader:
    """`decide` and `perform` are the engine's. Both do nothing on a replica that does not hold the lease.

    `run` limits it to one run; empty: every run.
    """

    def __init__(self, bus: Bus, facts: PositionedLog, clock: Callable[[], int] = now_ms, run: str = "") -> None:
        self._bus, self._facts, self._clock, self._run = bus, facts, clock, run
        self.lease: Lease | None = None

    @property
    def leading(self) -> bool:
        """Whether this replica may decide, right now."""
        return self.lease is not None and self.lease.held

    async def lead(self, lease_seconds: float, address: str, wake: Callable[[], None]) -> None:
        """Acquire the lease, decide while it is held, and acquire it again when it is lost; until cancelled.

        The leader's `address` is the one that others find the API at: it is known to be alive.
        """
        while True:
            async with Lease(self._bus, LEASE, lease_seconds) as lease:
                self.lease = lease
                try:
                    await self._register(address)
                    wake()
                    await lease.lost.wait()
                finally:
                    self.lease = None

    async def _register(self, address: str) -> None:
        while self.leading:
            try:
                await self._bus.register_endpoint("coordinator", address)
            except Retry as error:
                log.warning("cannot register the API's address, trying again", error=str(error))
                await asyncio.sleep(error.after)
            else:
                return

    def decide(self, facts: RunFacts, now_ms: int) -> Decision:
        """`handlers.decide` while leading."""
        mine = self._run in ("", facts.run)
        return handlers.decide(facts, now_ms) if mine and self.leading else Decision()

    async def perform(self, action: Action) -> None:
        """Decide once more on all that the broker has by now, and do it if it is still the same action.

        One stream may have been read less far than another; who is expected, and whether everyone acted, must not
        depend on that. Raises `Retry` when the broker is away.
        """
        await self._facts.refresh(self._bus, STREAMS)
        again = self.decide(self._facts.runs[action.run], self._clock())
        for confirmed in again.actions:
            if confirmed.key == action.key:
                await self._do(confirmed)

    async def _do(self, action: Action) -> None:
        match action.payload:
            case PublishFact(section, cycle, kind, message):
                await self._publish(action.run, section, cycle, kind, message)
            case CloseWindow():
                await self._close(action.run, action.payload)

    async def _close(self, run: str, close: CloseWindow) -> None:
        """Bans that stand in RUNS by now count in the window; the log here has to be that far to name them."""
        bans_until = await self._bus.last_sequence("RUNS")
        await self._facts.reach("RUNS", bans_until)
        message = cycle_pb2.WindowClosed(
            run=run,
            cycle=close.cycle,
            window=window_value(close.window),
            stream=close.stream,
            last_sequence=await self._bus.last_sequence(close.stream),
            cause=close.cause,
            runs_sequence=bans_until,
            banned=sorted(banned(self._facts.runs[run], bans_until)),
        )
        await self._publish(run, close.window, close.cycle, "closed", message)

    async def _publish(self, run: str, section: str, cycle: int, kind: str, message: Message) -> None:
        lease = self.lease
        if lease is None or not lease.held:
            # Whoever leads now has decided on the same facts; what is written late would only be refused.
            return
        stamped = type(message)()
        stamped.CopyFrom(message)
        if isinstance(stamped, _FENCED):
            stamped.fence = lease.revision
        if await self._bus.publish_fact(run, section, cycle, kind, stamped):
            self._report(run, section, cycle, kind, stamped)

    def _report(self, run: str, section: str, cycle: int, kind: str, message: Message) -> None:
        extra: dict[str, object] = {}
        if isinstance(message, cycle_pb2.WindowClosed):
            extra["cause"] = cycle_pb2.CloseCause.Name(message.cause).removeprefix("CLOSE_CAUSE_").lower()
        if isinstance(message, run_pb2.RunEnded):
            outcome = run_pb2.RunOutcome.Name(message.outcome).removeprefix("RUN_OUTCOME_").lower()
            extra |= {"outcome": outcome, "reason": reason_name(message.reason), "detail": message.detail}
        log.info(f"{section} {kind}", run=run, cycle=cycle, **extra)


def observe(facts: RunFacts, window: str, cycle: int) -> None:
    """Count the length of a window that was closed."""
    length, closed = window_ms(facts, window, cycle), facts.window(window, cycle).closed
    if length is not None and closed is not None:
        cause = cycle_pb2.CloseCause.Name(closed.cause).removeprefix("CLOSE_CAUSE_").lower()
        metrics.WINDOW_SECONDS.labels(window, cause).observe(length / 1000)
