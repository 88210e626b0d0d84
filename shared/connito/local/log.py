"""Reading runs from the log: once, or for as long as they last."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, suppress

from connito.bus import Bus, CaughtUp
from connito.errors import Invalid
from connito.facts import Fact, Log, Record, RunFacts
from connito.local.display import Display
from connito.roster import Roster
from connito.streams import FACT_STREAMS

_TICK_SECONDS = 0.5


async def read_log(bus: Bus, roster: Roster, run: str = "", streams: Sequence[str] = FACT_STREAMS) -> Log:
    """Everything stored at this moment, of one run or of all. What does not verify is left out, as everywhere."""
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
    """The run that was created last."""
    created = [
        (fact.sequence, facts) for facts in log.runs.values() if (fact := facts.fact("run", 0, "created")) is not None
    ]
    return max(created, key=lambda pair: pair[0])[1] if created else None


async def follow_run(
    bus: Bus,
    roster: Roster,
    run: str,
    names: Mapping[str, str],
    display: Display,
    until: Callable[[RunFacts], bool],
    on_fact: Callable[[Fact, RunFacts], None] = lambda fact, facts: None,
) -> RunFacts:
    """Show a run's facts as they come and return all of them once `until` holds."""
    log = Log(roster)
    facts = log.runs.setdefault(run, RunFacts(run))

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            display.tick()

    ticking = asyncio.create_task(tick())
    try:
        async with aclosing(bus.follow((*FACT_STREAMS, "INGRESS"), run)) as records:
            async for item in records:
                if not isinstance(item, CaughtUp) and (fact := apply(log, item)) is not None:
                    display.fact(fact, facts, names)
                    on_fact(fact, facts)
                if until(facts):
                    break
    finally:
        ticking.cancel()
    return facts
