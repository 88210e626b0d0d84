"""Answers to this miner, each looked up where it stands: what the committer tells everybody else is not read.

A miner follows what is said of all (windows, settlements, versions). Its own acceptances and refusals have subjects that it knows
beforehand, by its key and by where its messages stand in INGRESS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress

from connito.bus import Bus
from connito.errors import Retry
from connito.service.engine import Decision
from connito.wire import subjects
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.log import Log

from .handlers import decide, without_head
from .state import Ledger
from .strategy import Strategy

WINDOWS = ("commit", "submit")
LOOK_SECONDS = 5.0
# Of a settled window all answers are there; a replica of the broker may be a moment behind.
LAST_LOOK_SECONDS = 2 * LOOK_SECONDS


class Own:
    """Gives the engine (`take`) what is said to `me` in the cycles that may still matter, and wakes it then.

    `all_follow`: the engine follows what is said to everybody, and there is nothing to look up.
    """

    def __init__(self, bus: Bus, me: str, log: Log, ledger: Ledger, *, all_follow: bool = False) -> None:
        self._bus, self._me, self._log, self._ledger, self._all_follow = bus, me, log, ledger, all_follow
        self._due, self._began = asyncio.Event(), set[str]()
        # When a window was first seen to be settled.
        self._settled = dict[tuple[str, str, int], float]()

    def knows(self, run: str) -> bool:
        """Return whether what was said of this miner before it started is known."""
        return self._all_follow or run in self._began

    def notice(self, fact: Fact) -> None:
        """Look soon where something was decided, or a run begins."""
        if fact.key.kind in ("created", "opened", "settled"):
            self._due.set()

    async def follow(self, take: Callable[[Record], None], wake: Callable[[str], None]) -> None:
        """Look whenever there may be an answer, until cancelled."""
        heard = False
        while True:
            self._due.clear()
            try:
                if not heard:
                    await self._hear()
                    heard = True
                for run, facts in list(self._log.runs.items()):
                    await self._look(facts, take)
                    if run not in self._began and facts.spec is not None:
                        self._began.add(run)
                        wake(run)
            except Retry as error:
                await asyncio.sleep(error.after)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._due.wait()

    async def _hear(self) -> None:
        for window in WINDOWS:
            subject = f"{subjects.ROOT}.*.{window}.*.accepted.{self._me}"
            await self._bus.hear(window.upper(), subject, self._due.set)

    async def _look(self, facts: RunFacts, take: Callable[[Record], None]) -> None:
        if facts.spec is None or facts.ended is not None:
            return
        for cycle in facts.recent:
            for window in WINDOWS:
                for kind, id_ in self._open_questions(facts, window, cycle):
                    place = subjects.fact(facts.run, window, cycle, kind, id_)
                    record = await self._bus.look(window.upper(), last_by_subj=place)
                    if record is not None:
                        take(record)

    def _open_questions(self, facts: RunFacts, window: str, cycle: int) -> Iterator[tuple[str, str]]:
        """Yield kinds and ids of facts that may be there and are not known; refusals only where nothing was accepted."""
        view, settled = facts.window(window, cycle), facts.window(window, cycle).settled
        if view.opened is None or (settled is not None and self._too_late(facts.run, window, cycle)):
            return
        places = [place for one in (cycle - 1, cycle) for place in self._ledger.cycle(facts.run, one).places]
        if not facts.has(window, cycle, "accepted", self._me) and (places or not self.knows(facts.run)):
            yield "accepted", self._me
        if settled is None:
            answered = facts.has(window, cycle, "accepted", self._me)
        else:
            answered = self._me in (*settled.committed, *(entry.miner for entry in settled.submissions))
        if settled is not None:
            # What never came.
            places.append(0)
        for place in () if answered else places:
            if view.refusal(self._me, place) is None:
                yield "refused", f"{self._me}-{place}"

    def _too_late(self, run: str, window: str, cycle: int) -> bool:
        now = self._bus.host.monotonic()
        return now > self._settled.setdefault((run, window, cycle), now) + LAST_LOOK_SECONDS


def decide_with(me: str, ledger: Ledger, strategy: Strategy, own: Own, facts: RunFacts, now_ms: int) -> Decision:
    """Return the decision of `decide` on the content of the work folder; nothing before this miner's own answers are known."""
    if not own.knows(facts.run):
        return Decision()
    progress = ledger.progress(facts.run)
    waits = without_head(facts, me, progress, now_ms)
    return Decision([*decide(facts, me, progress, strategy).actions, *waits.actions], waits.wake_at_ms)
