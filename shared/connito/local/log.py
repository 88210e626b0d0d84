"""Follow a run in the log until it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing

from connito.bus import Bus, CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.local.display import Display
from connito.platform.log import apply
from connito.runtime.tasks import end_tasks
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.roster import Roster

_TICK_SECONDS = 0.5


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
        await end_tasks([ticking])
    return facts
