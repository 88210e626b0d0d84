"""Follow a run in the log until it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import aclosing, suppress
from typing import NoReturn

from connito.bus import Bus, CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid, Retry
from connito.local.display import Display
from connito.platform.log import apply
from connito.runtime.tasks import end_tasks
from connito.v1.cycle_pb2 import DeadLetter
from connito.wire import subjects
from connito.wire.envelope import open_bytes
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import DLQ_ROOT

_TICK_SECONDS = 0.5
_LETTER_SECONDS = 5.0
# Facts, until those of old cycles leave memory.
KEEP_EVERY = 200


async def follow_run(
    bus: Bus,
    roster: Roster,
    run: str,
    names: Mapping[str, str],
    display: Display,
    until: Callable[[RunFacts], bool],
    on_fact: Callable[[Fact, RunFacts], None] = lambda fact, facts: None,
) -> RunFacts:
    """Show a run's facts as they come and return all of them once `until` holds. Those of old cycles are not in memory."""
    log, unkept = Log(roster), 0
    log.kept = kept = Kept()
    facts = log.runs.setdefault(run, RunFacts(run, shelf=kept))

    async def tick() -> None:
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            display.tick()

    ticking = asyncio.create_task(tick())
    try:
        async with aclosing(bus.follow((*FACT_STREAMS, "INGRESS"), run)) as records:
            async for item in records:
                if not isinstance(item, CaughtUp) and (fact := apply(log, item)) is not None:
                    kept.put(fact)
                    if (unkept := unkept + 1) >= KEEP_EVERY and kept.commit({}):
                        log.let_go(run)
                        unkept = 0
                    display.fact(fact, facts, names)
                    on_fact(fact, facts)
                if until(facts):
                    break
    finally:
        await end_tasks([ticking])
    return facts


async def deposit_refused(bus: Bus, run: str) -> NoReturn:
    """Wait until the library has put aside what it should make of a run's end. Raises `Invalid` saying why."""
    while True:
        await asyncio.sleep(_LETTER_SECONDS)
        with suppress(Retry):
            ended = await bus.last_record(subjects.fact(run, "run", 0, "ended"))
            letter = None if ended is None else await bus.look("DLQ", last_by_subj=f"{DLQ_ROOT}.RUNS.{ended.sequence}")
            if letter is not None:
                detail = open_bytes(letter.data, letter.subject).read(DeadLetter).detail
                raise Invalid(
                    f"the library has put the expert of {run} aside: {detail}; once that is mended, `connito dlq retry` hands "
                    "it in again, and `connito up` goes on"
                )
