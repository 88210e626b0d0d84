"""Reading streams from the start and staying, by direct gets: no consumer on the broker, nothing there to keep or to clean up.

The position (last sequence seen) lives here. The broker repeats the subject of what it stores under `live.<stream>.`: a hint
to look again and never evidence, since others may be able to write there. Who missed one looks again after a while, and soon
where something happened in any of its streams and nothing more came: what follows it may be what was missed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from nats.errors import Error as NatsError

from connito.bus.connection import REQUEST_TIMEOUT, Connection
from connito.bus.streams import STREAMS, live
from connito.errors import Invalid, Retry
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import WAITING
from connito.wire.fact import Record

log = get_logger("bus.follow")

LOOK_SECONDS, QUIET_SECONDS = 5.0, 1.0
BATCH, BATCH_BYTES = 256, 1 << 18
# A replica that answers may be behind the one that hinted: look again this soon, then ever later, then wait for the next hint.
SOON, LATE = 0.01, 0.5
# So many looks in a row are free. Of a stream that never rests there are so many a second, and each takes what has gathered;
# where that is many, on average, nobody needs hints.
FREE_LOOKS, LOOKS_PER_SECOND, MANY = 50.0, 25.0, 2.0
_NUMBERS = itertools.count()


@dataclass(frozen=True)
class CaughtUp:
    """A marker: everything that was stored when the following began has been delivered."""


Item = Record | CaughtUp | BaseException


def record_of(msg: Any) -> Record:
    """Return a stored message as a consumer delivered it."""
    meta, parts = msg.metadata, msg.reply.split(".")
    # Nanoseconds, where the library has a float: readers by direct get see the same millisecond.
    time_ms = int(parts[7] if len(parts) == 9 else parts[9]) // 1_000_000
    return Record(meta.stream, meta.sequence.stream, msg.subject, msg.data, time_ms, dict(msg.headers or {}))


def got(stream: str, msg: Any) -> Record | None:
    """Return a stored message as a direct get answers it; None for a word of the broker itself.

    What the sender put into its headers stands before what the broker adds, and of equal names the last one holds.
    """
    headers = dict(msg.headers or {})
    # Not the subject, which a broker without the stream says too: "no responders" for the subject of the question.
    if "Nats-Sequence" not in headers:
        return None
    subject, sequence, stamp = (headers.pop(f"Nats-{name}") for name in ("Subject", "Sequence", "Time-Stamp"))
    return Record(stream, int(sequence), subject, msg.data, milliseconds(stamp), headers)


def milliseconds(stamp: str) -> int:
    """Return a time like 2026-11-26T13:16:43.779441275Z in Unix milliseconds, rounded down."""
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    return int(datetime.fromisoformat(f"{whole}+00:00").timestamp()) * 1000 + int(fraction[:3].ljust(3, "0"))


async def follow(
    connection: Connection,
    streams: Sequence[str],
    run: str,
    start: Mapping[str, int],
    *,
    of_all: bool = False,
    patience: float = math.inf,
) -> AsyncGenerator[Record | CaughtUp, None]:
    """Follow streams as `Bus.follow` says. Raises `Retry` for one that cannot be read for `patience` seconds."""
    queue: asyncio.Queue[Item] = asyncio.Queue(maxsize=2 * BATCH)
    behind = set(streams)

    async def reached_end(stream: str) -> None:
        if stream in behind:
            behind.discard(stream)
            if not behind:
                await queue.put(CaughtUp())

    news = _News()
    filters = {name: STREAMS[name].filter(run, of_all=of_all) for name in streams}
    readers = [
        _Reader(connection, name, filters[name], start.get(name, 1), queue, reached_end, patience, news)
        for name in streams
    ]
    tasks = [asyncio.create_task(reader.run()) for reader in readers]
    try:
        if not readers:
            yield CaughtUp()
        while True:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        await end_tasks(tasks)


async def in_whole(
    items: AsyncGenerator[Record | CaughtUp, None], whole: Callable[[Record], Awaitable[Record]]
) -> AsyncGenerator[Record | CaughtUp, None]:
    """Yield the same, each fact with its parts where those are not followed."""
    async with aclosing(items):
        async for item in items:
            if isinstance(item, CaughtUp) or not STREAMS[item.stream].of_all:
                yield item
            else:
                yield await _patiently(item, whole)


async def _patiently(record: Record, whole: Callable[[Record], Awaitable[Record]]) -> Record:
    while True:
        try:
            return await whole(record)
        except Retry as error:
            await asyncio.sleep(error.after)
        except Invalid:
            # Who applies it says so.
            return record


async def hear(connection: Connection, stream: str, subject: str, heard: Callable[[], None]) -> None:
    """Call `heard` at every hint about a subject, as long as the connection lives. Hints get lost, and lie."""

    async def hint(_: object) -> None:
        heard()

    try:
        await connection.nc.subscribe(live(stream, subject), cb=hint)
    except (NatsError, OSError) as error:
        raise connection.explain(error, f"stream {stream}") from error


@dataclass
class _News:
    """Holds when something was last heard of any of the streams that are followed together."""

    at: float = -math.inf


class _Reader:
    """Follows one stream into a queue."""

    def __init__(
        self,
        connection: Connection,
        stream: str,
        filter_: str,
        start: int,
        queue: asyncio.Queue[Item],
        reached_end: Any,
        patience: float,
        news: _News,
    ) -> None:
        self.now = asyncio.get_running_loop().time
        self.patience, self.answered_at, self.news = patience, self.now(), news
        # Strangers are many, and theirs is a mirror that stands behind.
        self.quiet = math.inf if connection.stranger else QUIET_SECONDS
        self.looked_behind = -math.inf
        self.connection, self.stream, self.queue = connection, stream, queue
        self.what = f"reading {stream} {next(_NUMBERS)}"
        self.subject = connection.stored_in(stream)
        self.filter = filter_
        self.narrow = filter_ != STREAMS[stream].filter() or bool(STREAMS[stream].beside)
        self.next_sequence = start
        self.reached_end = reached_end
        self.live = False
        # What was hinted at since the last look: how often, and the newest of it.
        self.hint, self.hints, self.hinted = asyncio.Event(), 0, 0
        self.free, self.looked_at, self.gained, self.taken = FREE_LOOKS, 0.0, 0.0, 0
        self.answers: asyncio.Queue[Any] = asyncio.Queue()

    async def run(self) -> None:
        """Read until cancelled; what cannot be recovered from goes into the queue as an exception."""
        try:
            while True:
                try:
                    await self._read()
                except Retry as error:
                    log.warning("cannot read a stream, trying again", stream=self.stream, error=str(error))
                    if self.now() - self.answered_at > self.patience:
                        raise
                    WAITING.begin(self.what, error, "", error.after)
                    await asyncio.sleep(error.after)
        except Exception as error:
            await self.queue.put(error)
        finally:
            WAITING.end(self.what)

    async def _read(self) -> None:
        """Read to the end again and again, through an inbox that no answer to an earlier question reaches."""
        nc, inbox, self.answers = self.connection.nc, self.connection.nc.new_inbox(), asyncio.Queue()
        self.connection.on_reconnect.append(self.hint.set)
        hints, answers = None, None
        try:
            # What is asked for while the broker is away, the client library asks for once it is back, wanted or not.
            self.connection.require()
            answers = await nc.subscribe(inbox, cb=self.answers.put)
            delay = SOON
            while True:
                flooded = await self._pace()
                if flooded and hints is not None:
                    await hints.unsubscribe()
                    hints = None
                elif not flooded and hints is None:
                    hints = await nc.subscribe(live(self.stream, self.filter), cb=self._on_hint)
                    # What came just before may be where no replica that answers has it yet.
                    self.hinted = self.next_sequence if self.live else 0
                self.hint.clear()
                before = self.taken
                while await self._ask(inbox):
                    pass
                self.gained += (min(self.taken - before, 10 * MANY) - self.gained) / 10
                self.answered_at = self.now()
                WAITING.end(self.what)
                if not self.live:
                    self.live = True
                    await self.reached_end(self.stream)
                if not flooded:
                    delay = await self._rest(delay)
        except (NatsError, OSError) as error:
            raise self.connection.explain(error, f"stream {self.stream}") from error
        finally:
            self.connection.on_reconnect.remove(self.hint.set)
            if not nc.is_closed:
                for subscription in (hints, answers):
                    with suppress(NatsError):
                        if subscription is not None:
                            await subscription.unsubscribe()

    async def _on_hint(self, msg: Any) -> None:
        with suppress(ValueError):
            self.hinted = max(self.hinted, int((msg.headers or {}).get("Nats-Sequence", 0)))
            self.hints += 1
        self.news.at = self.now()
        self.hint.set()

    async def _pace(self) -> bool:
        """Wait a moment where one look has followed the other for long; return whether hints would tell nothing: a flood is
        read by the batch.
        """
        now = self.now()
        self.free = min(FREE_LOOKS, self.free + (now - self.looked_at) * LOOKS_PER_SECOND) - 1
        flooded = self.free < 0
        if flooded:
            self.free = 0.0
            await asyncio.sleep(1 / LOOKS_PER_SECOND)
        self.looked_at = self.now()
        return flooded and self.gained >= MANY

    async def _rest(self, delay: float) -> float:
        """Wait for a hint or for a while; return how long to wait next time, where what was hinted at is not there yet."""
        missing = self.hinted >= self.next_sequence
        if not missing or delay > LATE:
            self.hinted, missing, delay = 0, False, SOON
        began = now = self.now()
        end = began + (delay if missing else LOOK_SECONDS)
        while not self.hint.is_set() and now < end:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(end - now, self.quiet)):
                    await self.hint.wait()
            now = self.now()
            if self.news.at > self.looked_behind and now >= began + self.quiet:
                # What came less than this ago may have something behind it yet.
                self.looked_behind = now - self.quiet
                break
        return 2 * delay if missing else SOON

    async def _ask(self, inbox: str) -> bool:
        """Ask for a batch, or for the one message that was hinted at, and take it in; return whether there is more.

        Behind a batch the broker says that it is whole: for one message that would be half of what it sends.
        """
        self.connection.require()
        alone, self.hints = self.live and self.hints == 1, 0
        body: dict[str, Any] = {"seq": self.next_sequence}
        if not alone:
            body |= {"batch": BATCH, "max_bytes": BATCH_BYTES}
        if alone or self.narrow:
            body["next_by_subj"] = self.filter
        with self.connection.failure_of(self.subject) as failed:
            failed.add_done_callback(partial(_tell, self.answers))
            await self.connection.nc.publish(self.subject, json.dumps(body).encode(), reply=inbox)
            while True:
                msg = await self._answer()
                if (record := got(self.stream, msg)) is not None:
                    await self._take(record)
                    if alone:
                        return record.sequence < self.hinted
                    continue
                headers = msg.headers or {}
                status = headers.get("Status", "")
                if status == "204":
                    return int(headers.get("Nats-Num-Pending", 0)) > 0
                if status == "404":
                    return False
                what = f"stream {self.stream}"
                if status == "503":
                    raise self.connection.silent(what, "run `connito streams ensure`")
                raise Retry(f"the broker answers {status or 'nothing'} for {what}", after=0.5, dependency="broker")

    async def _answer(self) -> Any:
        """Return the next answer. Raises what the connection or the broker's denial says, `Retry` when none comes."""
        if self.answers.empty():
            try:
                async with asyncio.timeout(REQUEST_TIMEOUT):
                    answer = await self.answers.get()
            except TimeoutError:
                raise self.connection.silent(f"stream {self.stream}") from None
        else:
            answer = self.answers.get_nowait()
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _take(self, record: Record) -> None:
        if record.sequence < self.next_sequence:
            raise Invalid(
                f"the broker answers {record.sequence} of {self.stream} where {self.next_sequence} was asked for"
            )
        await self.queue.put(record)
        self.taken += 1
        self.answered_at = self.now()
        self.next_sequence = record.sequence + 1
        metrics.EVENTS_RECEIVED.labels(self.stream).inc()
        if self.live:
            self.news.at = self.now()
            metrics.EVENT_LAG_SECONDS.labels(self.stream).set(max(0.0, time.time() - record.time_unix_ms / 1000))


def _tell(answers: asyncio.Queue[Any], failed: asyncio.Future[Exception]) -> None:
    """Put what a question failed of among its answers."""
    if not failed.cancelled():
        answers.put_nowait(failed.result())
