"""Working off a durable consumer: the error taxonomy decides what happens to each message."""

from __future__ import annotations

import asyncio
import json
from bisect import insort
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from nats.errors import Error as NatsError

from connito.bus.connection import Connection
from connito.bus.follow import record_of
from connito.bus.streams import DURABLES, Durable
from connito.bus.suspects import SetAside, Suspects
from connito.errors import Environment, Fatal, Invalid, Retry
from connito.runtime import logs, metrics, tracing, waiting
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import WAITING, Listener, here_and_now
from connito.v1 import reasons_pb2 as reasons
from connito.v1.cycle_pb2 import DeadLetter
from connito.wire.enums import reason_name
from connito.wire.fact import Record
from connito.wire.subjects import run_of

log = get_logger("bus.consume")

PULL_SECONDS = 5.0
BATCH = 256
# With so many lanes at hand nothing more is drawn, and never twice as many: of each message that is held the broker has to hear
# every few moments, which of ten thousand that wait was a fourth of all that it heard.
AHEAD = 64
# One that made its handler fail, with an error that has no meaning, so often.
FAULT_LIMIT = 4
SKIPPED_SECONDS = 0.03
_BODY_LIMIT = 900_000

Handler = Callable[[Record], Awaitable[None]]
Bury = Callable[[DeadLetter], Awaitable[None]]


class Worker(Listener):
    """Draws messages of a durable consumer and hands them on, `concurrency` at once.

    Each message is in a lane, and of a lane one message is handled at a time, in order; lanes take turns. Without `lane` every
    message is a lane of its own, as many are drawn as are handled, and one that has to wait goes back to the broker. With it,
    some are drawn ahead, up to what the consumer admits, and what has to wait holds up its lane and no other.
    """

    def __init__(
        self,
        connection: Connection,
        durable: str,
        handler: Handler,
        bury: Bury,
        heartbeat: float,
        concurrency: int = 1,
        lane: Callable[[Record], str] | None = None,
        skip: Callable[[Record], bool] | None = None,
        aside: Callable[[Record, Invalid], Awaitable[None]] | None = None,
    ) -> None:
        self.connection, self.handler, self.bury, self.heartbeat = connection, handler, bury, heartbeat
        self.durable: Durable = DURABLES[durable]
        self.suspects = Suspects(connection, durable)
        self.concurrency, self.lane, self.skip, self.aside = concurrency, lane, skip, aside
        self.most = self.durable.max_ack_pending if lane is not None else concurrency
        self.lanes: dict[str, list[int]] = {}
        self.held: dict[int, Any] = {}
        self.tries: Counter[int] = Counter()
        self.later: dict[str, asyncio.TimerHandle] = {}
        self.waits_for: dict[int, str] = {}
        self.faults: Counter[int] = Counter()
        self.skipped: list[Any] = []
        self.skipping = asyncio.Event()
        self.ready: asyncio.Queue[str] = asyncio.Queue()
        self.room, self.over = asyncio.Event(), asyncio.Event()
        self.asked = 0

    async def run(self) -> None:
        """Handle messages until cancelled. Raises `Fatal` where the handler does.

        Drawn through an inbox of its own and not through the library's `fetch`: that takes a message whose sender set a
        `Status` header for the server's own word and drops it, and a miner could block the queue with one.
        """
        inbox = self.connection.nc.new_inbox()
        subscription = await self.connection.nc.subscribe(inbox, cb=self._arrive)
        WAITING.listen(self)
        tasks = [asyncio.create_task(self._take_turns()) for _ in range(self.concurrency)]
        tasks += [asyncio.create_task(work) for work in (self._draw(inbox), self._beat(), self._drop())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await end_tasks(tasks)
            for handle in self.later.values():
                handle.cancel()
            with suppress(NatsError, OSError):
                await subscription.unsubscribe()
                await self._acknowledge_skipped()
                # In their order, or what is delivered anew to somebody else would come after what is new.
                for sequence in sorted(self.held):
                    await self.held[sequence].nak()

    async def _draw(self, inbox: str) -> None:
        """Ask for as many messages as there is room for, one request at a time; what is held stays through lost connections."""
        while True:
            wanted = self._wanted()
            self.room.clear()
            if wanted <= 0:
                await self.room.wait()
                continue
            try:
                self.connection.require()
                await self._request(inbox, wanted)
            except (NatsError, OSError, Retry) as error:
                if self.connection.nc.is_closed:
                    raise Fatal(f"the broker closed the connection of {self.durable.name}") from error
                log.warning("cannot read the work queue, trying again", durable=self.durable.name, error=str(error))
                await asyncio.sleep(error.after if isinstance(error, Retry) else 0.5)

    def _wanted(self) -> int:
        """Return how many messages there is room for. A lane that waits for its next try does not count as at hand."""
        at_hand, room = len(self.lanes) - len(self.later), min(BATCH, self.most - len(self.held))
        return room if self.lane is None else 0 if at_hand >= AHEAD else min(room, 2 * AHEAD - at_hand)

    async def _request(self, inbox: str, wanted: int) -> None:
        """Ask, and return when the request is over: answered in full, expired at the broker, or lost with the connection."""
        self.asked = wanted
        self.over.clear()
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self.durable.stream}.{self.durable.name}"
        request = json.dumps({"batch": wanted, "expires": int(PULL_SECONDS * 1e9)}).encode()
        over = asyncio.create_task(self.over.wait())
        try:
            with self.connection.failure_of(subject) as failed:
                await self.connection.nc.publish(subject, request, reply=inbox)
                await asyncio.wait((over, failed), timeout=PULL_SECONDS + 1, return_when=asyncio.FIRST_COMPLETED)
                if failed.done() and not over.done():
                    raise failed.result()
        finally:
            await end_tasks([over])

    async def _arrive(self, msg: Any) -> None:
        if msg.reply.startswith("$JS.ACK."):
            self.asked = max(0, self.asked - 1)
            record = record_of(msg)
            # What is delivered again while it waits here is the same message.
            known = record.sequence in self.held
            if not known and self.skip is not None and self.skip(record):
                self._count("skipped")
                self.skipped.append(msg)
                self.skipping.set()
            else:
                self.held[record.sequence] = msg
                if not known:
                    self._line_up(record)
        else:
            self.asked = 0
            status = (msg.headers or {}).get("Status", "")
            if status in ("404", "408"):
                metrics.CONSUMER_PENDING.labels(self.durable.name).set(0)
            else:
                hint = "; run `connito streams ensure`" if status == "503" else ""
                log.warning(f"the broker answers {status or 'nothing'}{hint}", durable=self.durable.name)
                await asyncio.sleep(0.3)
        if not self.asked:
            self.over.set()

    async def _drop(self) -> None:
        """Acknowledge what was skipped: of a flood many at a time, in one write."""
        while True:
            await self.skipping.wait()
            await asyncio.sleep(SKIPPED_SECONDS)
            await self._acknowledge_skipped()

    async def _acknowledge_skipped(self) -> None:
        skipped, self.skipped = self.skipped, []
        self.skipping.clear()
        for msg in skipped:
            with suppress(NatsError, OSError):
                await msg.ack()

    def _line_up(self, record: Record) -> None:
        lane = self.lane(record) if self.lane is not None else str(record.sequence)
        # What another replica was given, and comes back late, goes before what the same lane has here already.
        insort(self.lanes.setdefault(lane, []), record.sequence)
        if len(self.lanes[lane]) == 1:
            self.ready.put_nowait(lane)

    async def _take_turns(self) -> None:
        while True:
            lane = await self.ready.get()
            sequence = self.lanes[lane][0]
            delay = await self._handle(self.held[sequence])
            if delay is not None:
                self.later[lane] = asyncio.get_running_loop().call_later(delay, self._again, lane)
                self.room.set()
                continue
            self.lanes[lane].remove(sequence)
            del self.held[sequence], self.tries[sequence]
            self.waits_for.pop(sequence, None)
            if self.lanes[lane]:
                self.ready.put_nowait(lane)
            else:
                del self.lanes[lane]
            self.room.set()

    def _again(self, lane: str) -> None:
        self.later.pop(lane).cancel()
        self.ready.put_nowait(lane)

    def answered(self, dependency: str) -> None:
        """Handle at once what waits for a dependency that works again."""
        for lane in list(self.later):
            sequence = self.lanes[lane][0]
            if self.waits_for.get(sequence) == dependency:
                self.tries[sequence] = 0
                self._again(lane)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat)
            for msg in list(self.held.values()):
                with suppress(NatsError):
                    await msg.in_progress()

    async def _handle(self, msg: Any) -> float | None:
        """Handle a message; return after how many seconds to do so again, None when it is done with here."""
        record = record_of(msg)
        self.tries[record.sequence] += 1
        # In a lane a message is kept here, and how often it was delivered says how often somebody was killed.
        tries = self.tries[record.sequence] if self.lane is not None else msg.metadata.num_delivered
        metrics.CONSUMER_PENDING.labels(self.durable.name).set(msg.metadata.num_pending + 1)
        cause = logs.extract(record.headers)
        logs.use(cause)
        try:
            async with self.suspects.watch(record.sequence, msg.metadata.num_delivered > 1):
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
        except Fatal:
            raise
        except Exception as error:
            try:
                return await self._failed(msg, record, error, tries)
            except Environment as fault:
                # The dead letter cannot be written now.
                return await self._later(msg, record, fault, tries)
        else:
            # One that is not acknowledged comes again, and finds what was done.
            with suppress(NatsError, OSError):
                await msg.ack()
            self._count("ok")
            self._done(record)
        return None

    def _done(self, record: Record) -> None:
        WAITING.end(self._name(record))
        self.faults.pop(record.sequence, None)

    def _name(self, record: Record) -> str:
        return f"{self.durable.name} {record.sequence}"

    async def _later(self, msg: Any, record: Record, fault: Environment, tries: int) -> float | None:
        """Give a message back, or keep it where its lane waits with it; as often as it takes."""
        delay = waiting.delay(fault.after, tries - 1)
        WAITING.begin(self._name(record), fault, run_of(record.subject), delay)
        log.warning(
            "handled later", durable=self.durable.name, sequence=record.sequence, waits_for=fault.dependency,
            error=str(fault), delay=round(delay, 2),
        )  # fmt: skip
        self._count("retry")
        if self.lane is not None:
            self.waits_for[record.sequence] = fault.dependency
            return delay
        with suppress(NatsError, OSError):
            await msg.nak(delay=delay)
        return None

    async def _failed(self, msg: Any, record: Record, error: Exception, tries: int) -> float | None:
        """Do what an error means: later, as often as it takes, or a dead letter; at once for what is `Invalid`, and for what
        has no meaning when it came often enough. Whoever waits for an answer to what is set aside gets one.
        """
        if (fault := here_and_now(error)) is not None:
            return await self._later(msg, record, fault, tries)
        if not isinstance(error, Invalid):
            count = self.faults[record.sequence] = self.faults[record.sequence] + 1
            log.error("a message makes its handler fail", durable=self.durable.name, subject=record.subject,
                      sequence=record.sequence, failures=count, exc_info=error)  # fmt: skip
            if count < FAULT_LIMIT:
                return await self._later(
                    msg, record, Retry(f"its handler failed: {error}", dependency="handler"), tries
                )
            what = f"its handler failed {count} times: {type(error).__name__}: {error}"
            error = SetAside(what, reason=reasons.REASON_FAULT)
        if isinstance(error, SetAside) and self.aside is not None:
            await self.aside(record, error)
        await self._dead_letter(msg, record, error)
        return None

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
        with suppress(NatsError, OSError):
            await msg.term()
        self._count("dead_letter")
        self._done(record)

    def _count(self, outcome: str) -> None:
        metrics.MESSAGES_HANDLED.labels(self.durable.name, outcome).inc()
