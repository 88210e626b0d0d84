"""Reading streams from the start and staying: ephemeral pull consumers without acknowledgement.

The server may restart, stall or forget the consumer at any time; the position (last sequence seen) lives here, and the
consumer is made anew from it. Heartbeats show a stall, gaps in the consumer's own numbering show a loss.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nats.errors import Error as NatsError
from nats.js import api

from connito.bus.connection import Connection
from connito.bus.streams import STREAMS
from connito.errors import Fatal, Retry
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.wire.fact import Record

log = get_logger("bus.follow")

HEARTBEAT = 1.0
PULL_SECONDS = 30.0
BATCH = 256


@dataclass(frozen=True)
class CaughtUp:
    """A marker: everything that was stored when the following began has been delivered."""


Item = Record | CaughtUp | BaseException


def record_of(msg: Any) -> Record:
    """Return a stored message as the broker delivered it."""
    meta = msg.metadata
    time_ms = int(meta.timestamp.timestamp() * 1000)
    return Record(meta.stream, meta.sequence.stream, msg.subject, msg.data, time_ms, dict(msg.headers or {}))


async def follow(
    connection: Connection, streams: Sequence[str], run: str, start: Mapping[str, int]
) -> AsyncGenerator[Record | CaughtUp, None]:
    """Follow streams as `Bus.follow` says."""
    queue: asyncio.Queue[Item] = asyncio.Queue(maxsize=2 * BATCH)
    behind = set(streams)

    async def reached_end(stream: str) -> None:
        if stream in behind:
            behind.discard(stream)
            if not behind:
                await queue.put(CaughtUp())

    readers = [_Reader(connection, name, run, start.get(name, 1), queue, reached_end) for name in streams]
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


class _Reader:
    """Follows one stream into a queue."""

    def __init__(
        self, connection: Connection, stream: str, run: str, start: int, queue: asyncio.Queue[Item], reached_end: Any
    ) -> None:
        self.connection, self.stream, self.queue = connection, stream, queue
        self.filter = STREAMS[stream].filter(run)
        self.next_sequence = start
        self.reached_end = reached_end
        self.live = False

    async def run(self) -> None:
        """Read until cancelled; what cannot be recovered from goes into the queue as an exception."""
        try:
            while True:
                try:
                    await self._read_through_one_consumer()
                except Retry as error:
                    log.warning("cannot read a stream, trying again", stream=self.stream, error=str(error))
                    await asyncio.sleep(error.after)
        except Exception as error:
            await self.queue.put(error)

    async def _read_through_one_consumer(self) -> None:
        name, pending = await self._create_consumer()
        pull = _Pull(self, name, pending)
        inbox = self.connection.nc.new_inbox()
        subscription = await self.connection.nc.subscribe(inbox, cb=pull.on_message)
        self.connection.on_reconnect.add(pull.ended.set)
        try:
            if pending == 0:
                await self.reached_end(self.stream)
                self.live = True
            with self.connection.failure_of(pull.subject) as failed:
                await pull.request(inbox)
                await pull.watch(failed)
        except (NatsError, OSError) as error:
            raise self.connection.explain(error, self.stream) from error
        finally:
            self.connection.on_reconnect.discard(pull.ended.set)
            if not self.connection.nc.is_closed:
                await subscription.unsubscribe()
            # What the callback had taken off the wire is in the queue or will be read again.

    async def _create_consumer(self) -> tuple[str, int]:
        name = f"follow-{secrets.token_hex(8)}"
        config = api.ConsumerConfig(
            name=name,
            filter_subject=self.filter,
            deliver_policy=api.DeliverPolicy.BY_START_SEQUENCE,
            opt_start_seq=self.next_sequence,
            ack_policy=api.AckPolicy.NONE,
            mem_storage=True,
            num_replicas=1,
            inactive_threshold=30.0,
        )
        subject = f"$JS.API.CONSUMER.CREATE.{self.stream}.{name}.{self.filter}"
        body = json.dumps({"stream_name": self.stream, "config": config.as_dict(), "action": "create"}).encode()
        response = json.loads((await self.connection.request(subject, body)).data)
        if "error" in response:
            raise self._refused(response["error"])
        return name, int(response.get("num_pending", 0))

    def _refused(self, error: dict[str, Any]) -> Exception:
        if error.get("err_code") == 10059:  # stream not found
            return Retry(f"the broker has no stream {self.stream}; run `connito streams ensure`", after=1.0)
        if error.get("code") in (500, 503):
            return Retry(f"the broker cannot serve stream {self.stream} yet: {error.get('description')}", after=0.5)
        return Fatal(f"the broker refuses to read stream {self.stream}: {error.get('description')}")


class _Pull:
    """The pull requests of one consumer and the messages that answer them."""

    def __init__(self, reader: _Reader, consumer: str, pending: int) -> None:
        self.reader, self.stored = reader, pending
        self.subject = f"$JS.API.CONSUMER.MSG.NEXT.{reader.stream}.{consumer}"
        self.ended = asyncio.Event()
        self.outstanding, self.delivered = 0, 0
        self.heard = time.monotonic()

    async def request(self, inbox: str) -> None:
        """Ask for a batch; the answers arrive one by one, as they come."""
        self.inbox = inbox
        self.outstanding += BATCH
        body = {"batch": BATCH, "expires": int(PULL_SECONDS * 1e9), "idle_heartbeat": int(HEARTBEAT * 1e9)}
        await self.reader.connection.nc.publish(self.subject, json.dumps(body).encode(), reply=inbox)

    async def watch(self, failed: asyncio.Future[Exception]) -> None:
        """Wait until the consumer is no longer usable."""
        ended = asyncio.create_task(self.ended.wait())
        try:
            while not self.ended.is_set():
                await asyncio.wait((ended, failed), timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED)
                if failed.done():
                    raise failed.result()
                if time.monotonic() - self.heard > 3 * HEARTBEAT and self.reader.queue.empty():
                    log.warning("the broker fell silent, reading anew", stream=self.reader.stream)
                    return
        finally:
            await end_tasks([ended])

    async def on_message(self, msg: Any) -> None:
        """Handle a message or a status line of the server."""
        self.heard = time.monotonic()
        if self.ended.is_set():
            return
        if msg.reply.startswith("$JS.ACK"):
            await self._take(msg)
            return
        status = (msg.headers or {}).get("Status", "")
        if status == "408":  # the request ran out of time with this many unanswered
            self.outstanding = max(0, self.outstanding - int(msg.headers.get("Nats-Pending-Messages", BATCH)))
            await self._refill()
        elif status != "100":
            self.ended.set()

    async def _take(self, msg: Any) -> None:
        reader, record = self.reader, record_of(msg)
        self.delivered += 1
        if msg.metadata.sequence.consumer != self.delivered:
            log.warning("messages were lost on the way, reading them anew", stream=reader.stream)
            self.ended.set()
            return
        self.outstanding -= 1
        await reader.queue.put(record)
        reader.next_sequence = record.sequence + 1
        metrics.EVENTS_RECEIVED.labels(reader.stream).inc()
        if reader.live:
            metrics.EVENT_LAG_SECONDS.labels(reader.stream).set(max(0.0, time.time() - record.time_unix_ms / 1000))
        elif self.delivered >= self.stored:
            reader.live = True
            await reader.reached_end(reader.stream)
        await self._refill()

    async def _refill(self) -> None:
        if self.outstanding <= BATCH // 2 and not self.ended.is_set():
            await self.request(self.inbox)
