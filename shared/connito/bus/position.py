"""A log that knows how far each stream was read, so that a reader can wait until it has seen what the broker has.

Streams are read side by side, and one may lag behind the others by any amount. Where that matters (refusing somebody,
closing a window), `refresh` turns "as far as I know" into "as of now".
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from connito.bus import Bus
from connito.bus.streams import STREAMS
from connito.errors import Retry
from connito.runtime.tasks import end_tasks
from connito.wire.fact import Fact, Record
from connito.wire.heads import LogTrees
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster

# Who reads is asked first, and the broker after so long.
LOOK_SECONDS = 1.0


class PositionedLog(Log):
    """`facts.Log` with positions. Fill it from followers of whole streams: one that is filtered to a run never gets
    to the end of a stream."""

    def __init__(self, roster: Roster, trees: LogTrees | None = None, *, patience_s: float = 10.0) -> None:
        super().__init__(roster, trees)
        self._patience_s = patience_s
        self._seen: dict[str, int] = {}
        self._moved = asyncio.Event()

    def apply(self, record: Record) -> Fact | None:
        """Apply a record as `Log.apply` does; a record that does not verify still counts as read."""
        try:
            return super().apply(record)
        finally:
            self.read(record)

    def read(self, record: Record) -> None:
        """Count a record as read."""
        self._seen[record.stream] = max(record.sequence, self._seen.get(record.stream, 0))
        self._moved.set()

    def restore(self, kept: Kept) -> None:
        """Begin with what is kept, and count as read what was read then."""
        super().restore(kept)
        self._seen = {stream: sequence for stream, (sequence, _) in kept.positions().items()}

    def position(self, stream: str) -> int:
        """Return the last sequence of `stream` that was read; 0 before the first."""
        return self._seen.get(stream, 0)

    async def reach(self, stream: str, sequence: int) -> None:
        """Wait until `stream` has been read up to `sequence`. Raises `Retry` when that takes unusually long."""
        if self._seen.get(stream, 0) >= sequence:
            return
        try:
            async with asyncio.timeout(self._patience_s):
                while self._seen.get(stream, 0) < sequence:
                    self._moved.clear()
                    await self._moved.wait()
        except TimeoutError as error:
            raise Retry(
                f"{stream} was read up to {self._seen.get(stream, 0)} of {sequence}; the broker is slow or away",
                dependency="broker",
            ) from error

    async def refresh(self, bus: Bus, streams: Sequence[str]) -> None:
        """Wait until everything that the broker has stored in `streams` by now is in the facts. Raises `Retry`."""
        ends = await asyncio.gather(*(bus.last_sequence(stream) for stream in streams))
        await asyncio.gather(*(self._reach_end(bus, stream, end) for stream, end in zip(streams, ends, strict=True)))

    async def _reach_end(self, bus: Bus, stream: str, end: int) -> None:
        """Reach the end of a stream, or what is left of it: with a run that was released, or in a backup, its end may be gone."""
        reaching, filter_ = asyncio.ensure_future(self.reach(stream, end)), STREAMS[stream].filter()
        try:
            while not (await asyncio.wait([reaching], timeout=LOOK_SECONDS))[0]:
                if await bus.gone(stream, seq=self.position(stream) + 1, next_by_subj=filter_):
                    # Of what was stored up to the end, everything that is left has been read.
                    self._seen[stream] = max(end, self.position(stream))
                    self._moved.set()
            await reaching
        finally:
            await end_tasks([reaching])
