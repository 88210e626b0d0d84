"""Working off a durable consumer: the error taxonomy decides what happens to each message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from nats.errors import Error as NatsError

from connito.bus.connection import Connection
from connito.bus.follow import record_of
from connito.bus.streams import DURABLES, Durable
from connito.errors import Fatal, Invalid, Retry
from connito.runtime import logs, metrics, tracing
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.v1 import reasons_pb2 as reasons
from connito.v1.cycle_pb2 import DeadLetter
from connito.wire.enums import reason_name
from connito.wire.fact import Record

log = get_logger("bus.consume")

PULL_SECONDS = 5.0
# A message that was delivered this often and never finished kills whoever handles it, or waits for what never comes.
DELIVERY_LIMIT = 100
MAX_DELAY = 30.0
_BODY_LIMIT = 900_000

Handler = Callable[[Record], Awaitable[None]]
Bury = Callable[[DeadLetter], Awaitable[None]]


class Worker:
    """One of the `concurrency` loops of a durable consumer."""

    def __init__(self, connection: Connection, durable: str, handler: Handler, bury: Bury, heartbeat: float) -> None:
        self.connection, self.handler, self.bury, self.heartbeat = connection, handler, bury, heartbeat
        self.durable: Durable = DURABLES[durable]

    async def run(self) -> None:
        """Handle messages until cancelled. Raises what the handler raised, unless it is `Retry` or `Invalid`."""
        while True:
            try:
                await self._work()
            except (NatsError, OSError, Retry) as error:
                if self.connection.nc.is_closed:
                    raise Fatal(f"the broker closed the connection of {self.durable.name}") from error
                log.warning("cannot read the work queue, trying again", durable=self.durable.name, error=str(error))
                await asyncio.sleep(error.after if isinstance(error, Retry) else 0.5)

    async def _work(self) -> None:
        """Draw messages one by one through an inbox of its own.

        Not through the library's `fetch`: it takes a message whose sender set a `Status` header for the server's own
        word and drops it, and a miner could block the queue with one.
        """
        arrived: asyncio.Queue[Any] = asyncio.Queue()

        async def arrive(msg: Any) -> None:
            arrived.put_nowait(msg)

        inbox = self.connection.nc.new_inbox()
        subscription = await self.connection.nc.subscribe(inbox, cb=arrive)
        try:
            while True:
                self.connection.require()
                await self._handle_next(inbox, arrived)
        finally:
            if not self.connection.nc.is_closed:
                with suppress(NatsError):
                    await subscription.unsubscribe()

    async def _handle_next(self, inbox: str, arrived: asyncio.Queue[Any]) -> None:
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.durable.stream}.{self.durable.name}"
        request = json.dumps({"batch": 1, "expires": int(PULL_SECONDS * 1e9)}).encode()
        with self.connection.failure_of(subject) as failed:
            if arrived.empty():
                await self.connection.nc.publish(subject, request, reply=inbox)
            getting = asyncio.ensure_future(arrived.get())
            try:
                await asyncio.wait((getting, failed), timeout=PULL_SECONDS + 1, return_when=asyncio.FIRST_COMPLETED)
                if failed.done() and not getting.done():
                    raise failed.result()
                msg = getting.result() if getting.done() else None
            finally:
                await end_tasks([getting])
        if msg is None:
            return
        if msg.reply.startswith("$JS.ACK."):
            await self._handle(msg)
        elif (status := (msg.headers or {}).get("Status", "")) in ("404", "408"):
            metrics.CONSUMER_PENDING.labels(self.durable.name).set(0)
        else:
            hint = "; run `connito streams ensure`" if status == "503" else ""
            raise Retry(f"the broker answers {status or 'nothing'} for consumer {self.durable.name}{hint}", after=0.3)

    async def _handle(self, msg: Any) -> None:
        record, delivered = record_of(msg), msg.metadata.num_delivered
        metrics.CONSUMER_PENDING.labels(self.durable.name).set(msg.metadata.num_pending + 1)
        cause = logs.extract(record.headers)
        logs.use(cause)
        beating = asyncio.create_task(self._beat(msg))
        try:
            with (
                tracing.span(
                    f"process {self.durable.name}",
                    "CONSUMER",
                    cause,
                    system="nats",
                    destination_name=record.subject,
                    message_id=record.sequence,
                ),
                metrics.HANDLER_SECONDS.labels(self.durable.name).time(),
            ):
                await self.handler(record)
        except Retry as error:
            if delivered >= DELIVERY_LIMIT:
                await self._dead_letter(msg, record, Invalid(f"gave up after {delivered} deliveries: {error}"))
            else:
                delay = min(MAX_DELAY, error.after * 2 ** min(delivered - 1, 10))
                log.warning(
                    "handled later", durable=self.durable.name, sequence=record.sequence, error=str(error), delay=delay
                )
                await msg.nak(delay=delay)
                self._count("retry")
        except Invalid as error:
            await self._dead_letter(msg, record, error)
        else:
            await msg.ack()
            self._count("ok")
        finally:
            await end_tasks([beating])

    async def _beat(self, msg: Any) -> None:
        while True:
            await asyncio.sleep(self.heartbeat)
            with suppress(NatsError):
                await msg.in_progress()

    async def _dead_letter(self, msg: Any, record: Record, error: Invalid) -> None:
        log.warning(
            "dead letter", durable=self.durable.name, subject=record.subject, sequence=record.sequence,
            reason=reason_name(error.reason), error=str(error),
        )  # fmt: skip
        letter = DeadLetter(
            stream=record.stream,
            sequence=record.sequence,
            subject=record.subject,
            body=record.data[:_BODY_LIMIT],
            reason=error.reason or reasons.REASON_MALFORMED,
            detail=str(error)[:1000],
            service=self.durable.name,
        )
        # First the copy, then the end of the message: a crash in between writes the same copy again, which is refused.
        await self.bury(letter)
        await msg.term()
        self._count("dead_letter")

    def _count(self, outcome: str) -> None:
        metrics.MESSAGES_HANDLED.labels(self.durable.name, outcome).inc()
