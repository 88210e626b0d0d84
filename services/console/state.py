"""Data of the console: every verified fact, the dead letters, and the progress of reading."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from connito.bus import Bus, CaughtUp, offences
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid, Retry
from connito.runtime.host import now_ms
from connito.runtime.tasks import end_tasks
from connito.service.unbegun import Unbegun
from connito.v1.cycle_pb2 import DeadLetter
from connito.wire.envelope import open_bytes
from connito.wire.fact import Record
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster

STREAMS = (*FACT_STREAMS, "INGRESS", "DLQ")
# Services that put what they cannot handle into the dead-letter stream.
_DEAD_LETTER_SIGNERS = ("committer", "selector", "library")
SAMPLE_SECONDS = 0.5
SIZE_EVERY = 10


@dataclass(frozen=True)
class StoredLetter:
    """A dead letter and where it lies."""

    number: int
    time_unix_ms: int
    letter: DeadLetter


@dataclass
class Stream:
    """The progress of reading a stream. `stored` is None until the broker has been asked."""

    read: int = 0
    stored: int | None = None
    last_unix_ms: int = 0


@dataclass(frozen=True)
class Connection:
    """The state of the line to the broker. `since_unix_ms` is when it became so."""

    connected: bool
    caught_up: bool
    since_unix_ms: int


@dataclass
class Feed:
    """Reads the streams from the start and stays. `version` grows with everything that may change a page."""

    bus: Bus
    roster: Roster
    run: str = ""
    clock: Callable[[], int] = now_ms
    letters: list[StoredLetter] = field(default_factory=list)
    streams: dict[str, Stream] = field(default_factory=lambda: {name: Stream() for name in STREAMS})
    rejected: int = 0
    version: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        self.log = Log(self.roster)
        self._unbegun = Unbegun(Kept())
        self.caught_up = asyncio.Event()
        self.connection = Connection(self.bus.connected, caught_up=False, since_unix_ms=self.clock())
        self._moved = asyncio.Event()

    @property
    def runs(self) -> dict[str, RunFacts]:
        """Return the facts of every run."""
        return self.log.runs

    async def follow(self) -> None:
        """Read until cancelled. Raises `Invalid` when this key may not read, `Fatal` when the broker is gone for good."""
        sampling = asyncio.create_task(self._sample())
        try:
            async for item in self.bus.follow(STREAMS, self.run):
                if isinstance(item, CaughtUp):
                    self.caught_up.set()
                    self._connection_is(connected=True)
                else:
                    self._take(item)
                self.move()
        finally:
            await end_tasks([sampling])

    async def changed(self, seen: int, timeout: float) -> int:
        """Wait until there is more than version `seen`, for at most `timeout` seconds. Returns the version now."""
        if self.version == seen and not self.closed:
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._moved.wait()
        return self.version

    def close(self) -> None:
        """Tell everybody who waits that nothing more will come."""
        self.closed = True
        self.move()

    def move(self) -> None:
        """Say that a page may look different now."""
        self.version += 1
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _take(self, record: Record) -> None:
        stream = self.streams[record.stream]
        stream.read, stream.last_unix_ms = record.sequence, record.time_unix_ms
        stream.stored = max(record.sequence, stream.stored or 0)
        try:
            if record.stream == "DLQ":
                self.letters.append(StoredLetter(record.sequence, record.time_unix_ms, self._letter(record)))
            else:
                for ready in self._unbegun.ready(record):
                    self.log.apply(ready)
        except Invalid as error:
            self.rejected += 1
            # The console reports nothing: the services that act on the message do.
            offences.ignore(record, error, new=False)

    def _letter(self, record: Record) -> DeadLetter:
        opened = open_bytes(record.data, record.subject)
        if not any(self.roster.permits(role, opened.signer) for role in _DEAD_LETTER_SIGNERS):
            raise Invalid(f"{short_key(opened.signer)} may not write dead letters")
        return opened.read(DeadLetter)

    # The state of the line.

    async def _sample(self) -> None:
        rounds = 0
        while True:
            if self.bus.connected != self.connection.connected:
                self._connection_is(connected=self.bus.connected)
                self.move()
            if rounds % SIZE_EVERY == 0 and self.bus.connected:
                with suppress(Retry, Invalid):
                    await self._ask_sizes()
            rounds += 1
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _ask_sizes(self) -> None:
        for name, stream in self.streams.items():
            stored = await self.bus.last_sequence(name)
            if stored != stream.stored:
                stream.stored = max(stored, stream.read)
                self.move()

    def _connection_is(self, *, connected: bool) -> None:
        self.connection = Connection(connected, self.caught_up.is_set(), self.clock())
