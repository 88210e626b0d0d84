"""Leave a run that makes a program fail: try it again a few times, then say so in the log and go on with all others.

Whatever is raised without a meaning (`connito.errors`) is taken for the run's doing, except where it is the
machine's (`connito.runtime.waiting`); that passes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from connito.bus import Bus
from connito.errors import Invalid, Retry
from connito.runtime.logs import get_logger
from connito.runtime.waiting import here_and_now, worded
from connito.v1 import reasons_pb2, run_pb2
from connito.wire.bounds import cut
from connito.wire.facts import RunFacts

log = get_logger("engine")

# Failures in a row after which a run is left, and the longest wait between them, in seconds.
TRIES = 5
MAX_WAIT = 30.0
MAX_DETAIL, _MAX_ACTION = 1000, 200


@dataclass
class Pauses:
    """The runs in which something failed. `service` names who writes down that it left one; a miner tells nobody."""

    service: str = ""
    failures: dict[tuple[str, str], int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def failed(self, run: str, action: str, error: Exception) -> float | None:
        """Count a failure; return after how many seconds to try again, None when it has failed often enough."""
        count = self.failures[run, action] = self.failures.get((run, action), 0) + 1
        log.error("this run makes something fail", run=run, action=action, failures=count, exc_info=error)
        return None if count >= TRIES and here_and_now(error) is None else min(MAX_WAIT, 0.5 * 2.0 ** min(count, 10))

    def succeeded(self, run: str, action: str) -> None:
        """Forget what failed before."""
        self.failures.pop((run, action), None)

    def notice(self, facts: RunFacts, action: str, error: Exception) -> run_pb2.RunPaused | None:
        """Return what is to be told about a run that is left, once for each."""
        if not self.service or facts.spec is None or facts.run in self.told:
            return None
        self.told.add(facts.run)
        return run_pb2.RunPaused(
            run=facts.run,
            service=self.service,
            in_cycle=facts.cycle,
            action=cut(action, _MAX_ACTION),
            reason=error.reason if isinstance(error, Invalid) else reasons_pb2.REASON_FAULT,
            detail=cut(worded(error), MAX_DETAIL),
        )


async def publish(bus: Bus, notice: run_pb2.RunPaused) -> None:
    """Write down that a run was left, however long the broker is away."""
    notice.key = bus.identity.public
    log.error("left this run", run=notice.run, action=notice.action, detail=notice.detail)
    while True:
        try:
            await bus.publish_fact(notice.run, "run", 0, "paused", notice, notice.key)
        except Retry as error:
            await asyncio.sleep(error.after)
        else:
            return
