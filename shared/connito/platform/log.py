"""Read runs from the log, as they stand at this moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing, suppress

from connito.bus import Bus, CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.roster import Roster


async def read_log(bus: Bus, roster: Roster, run: str = "", streams: Sequence[str] = FACT_STREAMS) -> Log:
    """Read the stored log of one run or of all; messages that do not verify are left out."""
    log = Log(roster)
    async with aclosing(bus.follow(streams, run)) as records:
        async for item in records:
            if isinstance(item, CaughtUp):
                break
            apply(log, item)
    return log


def apply(log: Log, record: Record) -> Fact | None:
    """Insert a record if it verifies and is new."""
    with suppress(Invalid):
        return log.apply(record)
    return None


def newest(log: Log) -> RunFacts | None:
    """Return the run that was created last."""
    created = [(fact.sequence, facts) for facts in log.runs.values() if (fact := facts.created_fact) is not None]
    return max(created, key=lambda pair: pair[0])[1] if created else None
