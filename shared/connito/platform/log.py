"""Read runs from the log, as they stand at this moment."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from connito.bus import Bus
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid
from connito.platform.session import Session
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.roster import Roster


async def read_log(bus: Bus, roster: Roster, run: str = "", streams: Sequence[str] = FACT_STREAMS) -> Log:
    """Read the stored log of one run or of all; messages that do not verify are left out."""
    log = Log(roster)
    async for record in bus.stored(streams, run):
        apply(log, record)
    return log


async def read_runs(session: Session, bus: Bus) -> Log:
    """Read the stored log of all runs."""
    return await read_log(bus, session.roster)


def apply(log: Log, record: Record) -> Fact | None:
    """Insert a record if it verifies and is new."""
    with suppress(Invalid):
        return log.apply(record)
    return None


async def hear_trained(bus: Bus, log: Log, run: str) -> None:
    """Read what miners say of a run in whose train window they are awaited: nothing else tells how many are here."""
    facts = log.runs[run]
    window = facts.open_window if facts.ended is None else None
    if window is not None and window.name == "train":
        # Whose key does not open it sees what stands in the other streams.
        with suppress(Invalid):
            async for record in bus.stored(("INGRESS",), run):
                apply(log, record)


def newest(log: Log) -> RunFacts | None:
    """Return the run that was created last."""
    created = [(fact.sequence, facts) for facts in log.runs.values() if (fact := facts.created_fact) is not None]
    return max(created, key=lambda pair: pair[0])[1] if created else None
