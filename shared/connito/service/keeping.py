"""Keep on the disk what was read of the log, so that a start and the memory do not grow with the age of what is followed.

What a process begins with is what one before it has read and verified, if the log still has the messages that it read last.
What could not be read here is not kept: the next process tries it again.
"""

from __future__ import annotations

import asyncio
import json

from connito.bus import Bus
from connito.errors import Fatal, Retry
from connito.runtime.logs import get_logger
from connito.runtime.waiting import WAITING
from connito.wire.fact import Record
from connito.wire.kept import Kept, anchor_of
from connito.wire.log import Log
from connito.wire.subjects import run_of

log = get_logger("engine")

# After so long or so many messages, what was read is kept. What came since is read again after a kill.
EVERY_SECONDS, EVERY_MESSAGES = 5.0, 4096
# Keeping notes what is open, which with thousands of miners is much: it is done again after so many times as long as it took,
# or when so many messages wait in memory.
REST, MOST_MESSAGES = 100, 8192
LOOKS, LOOK_SECONDS = 5, 0.2
# Newest runs that are looked at where the log is not the one that was kept.
MOST_RUNS = 32


class Keeping:
    """Keeps what an engine reads into a log."""

    def __init__(self, kept: Kept, facts: Log, bus: Bus) -> None:
        self.kept, self._log, self._bus = kept, facts, bus
        self._last: dict[str, Record] = {}
        self._changed: set[str] = set()
        self._messages, self._due, self._soonest, self._stopped = 0, 0.0, 0.0, False

    async def begin(self) -> dict[str, int]:
        """Fill the log with what is kept; return by stream where to go on. Raises `Fatal` for a damaged file."""
        positions = self.kept.positions()
        for stream, (sequence, anchor) in positions.items():
            record = await self._stored_at(stream, sequence)
            if record is None or anchor_of(record) != anchor:
                log.warning("another log than the one that was kept: it is read from the start", stream=stream)
                await self._tell_lost(stream)
                self.kept.forget()
                positions = {}
                break
        self._log.restore(self.kept)
        return {stream: sequence + 1 for stream, (sequence, _) in positions.items()}

    async def _tell_lost(self, stream: str) -> None:
        """Say of which runs the broker has the first fact that was read here, and not the last: of one that was archived, or in
        another log, it has neither.
        """
        for run, first, last in self.kept.spans(stream)[:MOST_RUNS]:
            # Of most runs nothing is there any more, and a stranger's wait for each would add up to a minute.
            begun = await self._stored_at(stream, first, looks=0)
            if begun is None or run_of(begun.subject) != run:
                continue
            ended = await self._stored_at(stream, last)
            if ended is not None and run_of(ended.subject) == run:
                continue
            error = Fatal(
                f"the broker has lost what it had stored: message {last} of {stream}, a fact of this run that was read here. "
                "Restore a backup into an empty folder (`connito restore`), or start another run"
            )
            log.error("the broker has lost a fact", run=run, stream=stream, sequence=last)
            WAITING.give_up(f"{run}/{stream}/lost", error, run)

    async def _stored_at(self, stream: str, sequence: int, looks: int = LOOKS) -> Record | None:
        looked = 0
        while True:
            try:
                found, looked = await self._bus.look(stream, seq=sequence), looked + 1
                # A replica that is behind has it not yet; who may not ask the leader gives it a moment.
                if found or (looked > looks if self._bus.stranger else await self._bus.gone(stream, seq=sequence)):
                    return found
                await asyncio.sleep(LOOK_SECONDS)
            except Retry as error:
                log.warning("cannot look where the log was left, trying again", stream=stream, error=str(error))
                await asyncio.sleep(error.after)

    def read(self, record: Record) -> None:
        """Take in that a message was read, and what follows from it applied."""
        self._last[record.stream] = record
        self._changed.add(run_of(record.subject))
        self._messages += 1
        now = self._bus.host.monotonic()
        enough = self._messages >= EVERY_MESSAGES and now >= self._soonest
        if now >= self._due or enough or self._messages >= MOST_MESSAGES:
            self.keep()
            done = self._bus.host.monotonic()
            self._soonest = done + REST * (done - now)
            self._due = max(self._due, self._soonest)

    def keep(self) -> None:
        """Keep what was read so far, and let go in memory of what is seldom asked for."""
        self._messages, self._due = 0, self._bus.host.monotonic() + EVERY_SECONDS
        if self._stopped:
            return
        for run in self._changed:
            if note := self._log.note(run):
                self.kept.note(run, json.dumps(note).encode())
        if self.kept.commit(self._last):
            for run in self._changed:
                self._log.let_go(run)
        else:
            log.warning("what is read is kept in memory alone", why=self.kept.closed_for_writing)
            self.stop()
        self._changed.clear()
        self._last.clear()

    def stop(self) -> None:
        """Keep nothing more: what was read last is to be read again."""
        self._stopped = True
