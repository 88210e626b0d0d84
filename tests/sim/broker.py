"""A broker in memory as JetStream's clients see it: a log per stream, compare-and-set by subject, work queues, expiring keys."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, deque
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from random import Random
from typing import Any

from connito.bus.follow import milliseconds
from connito.bus.streams import DURABLES, LEASE_TTL, STREAMS, stream_of
from connito.wire.fact import Record
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, OutboundBufferLimitError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext

from tests.sim.clockwork import EPOCH, Process, VirtualLoop

Headers = dict[str, str]


def _stamp(seconds: float) -> str:
    return datetime.fromtimestamp(EPOCH + seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f") + "000Z"


# What the broker adds to the headers of a stored message where it is read from the stream.
ADDED = ("Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp")


@dataclass
class Stored:
    record: Record
    headers: Headers


@dataclass
class Key:
    value: bytes
    sequence: int
    until: float
    headers: Headers


@dataclass
class Pull:
    client: Client
    inbox: str
    count: int
    until: float


class Queue:
    """A durable consumer: what was given to somebody comes again until it is acknowledged."""

    def __init__(self, name: str) -> None:
        self.durable = DURABLES[name]
        self.next, self.floor, self.given = 1, 0, 0
        self.busy: dict[int, float] = {}
        self.again: dict[int, float] = {}
        self.done: set[int] = set()
        self.deliveries: Counter[int] = Counter()
        self.pulls: deque[Pull] = deque()

    def due(self, now: float, last: int) -> int | None:
        """Take the next message that may be given out."""
        for sequence in [one for one, until in self.busy.items() if until <= now]:
            del self.busy[sequence]
            self.again[sequence] = now
        ready = [one for one, at in self.again.items() if at <= now]
        if ready:
            sequence = min(ready)
            del self.again[sequence]
        elif self.next <= last:
            sequence, self.next = self.next, self.next + 1
        else:
            return None
        self.busy[sequence] = now + self.durable.ack_wait
        self.deliveries[sequence] += 1
        return sequence

    def finish(self, sequence: int) -> None:
        self.busy.pop(sequence, None)
        self.again.pop(sequence, None)
        self.done.add(sequence)
        while self.floor + 1 in self.done:
            self.floor += 1


@dataclass
class Weather:
    """How likely the network fails, for one thing at a time."""

    slow: float = 0.0
    lost_ack: float = 0.0
    lost_hint: float = 0.0
    forget_id: float = 0.0
    behind: float = 0.0


def _matches(subject: str, pattern: str) -> bool:
    parts, wanted = subject.split("."), pattern.split(".")
    if wanted[-1] == ">":
        wanted = wanted[:-1]
        parts, longer = parts[: len(wanted)], len(parts) > len(wanted)
        if not longer:
            return False
    return len(parts) == len(wanted) and all(two in ("*", one) for one, two in zip(parts, wanted, strict=True))


class Broker:
    def __init__(self, loop: VirtualLoop, rng: Random, weather: Weather) -> None:
        self.loop, self.rng, self.weather = loop, rng, weather
        self.streams: dict[str, list[Stored]] = {name: [] for name in STREAMS}
        self.last: dict[str, int] = {}
        self.ids: dict[str, int] = {}
        self.keys: dict[str, Key] = {}
        self.written = Counter[str]()
        self.queues = {name: Queue(name) for name in DURABLES}
        self.clients: list[Client] = []
        self.up = True
        self.leaderless: dict[str, float] = {}
        self._awaited: dict[str, asyncio.Event] = {}

    def records(self, *streams: str) -> list[Record]:
        return [one.record for name in streams for one in self.streams[name]]

    async def written_to(self, subject: str) -> None:
        """Wait until something stands on a subject."""
        await self._awaited.setdefault(subject, asyncio.Event()).wait()

    # Faults

    def stop(self, seconds: float) -> None:
        self.up = False
        for client in list(self.clients):
            client.lose(seconds)
        self.loop.call_later(seconds, self._start, context=self.loop.between)

    def _start(self) -> None:
        self.up = True

    def elect(self, stream: str, seconds: float) -> None:
        """Leave a stream without a leader: nobody answers what only the leader may, and outstanding pulls are lost."""
        self.leaderless[stream] = self.loop.now + seconds
        for queue in self.queues.values():
            if queue.durable.stream == stream:
                queue.pulls.clear()

    # Requests

    def receive(self, client: Client, subject: str, data: bytes, reply: str, headers: Headers) -> None:
        if not self.up:
            return
        if subject.startswith("$JS.ACK."):
            self._acknowledge(subject.split("."), data)
        elif subject.startswith("$JS.API.DIRECT.GET."):
            client.send(reply, self._get(subject.split(".", 5)[4:], json.loads(data or b"{}")))
        elif subject.startswith("$JS.API.CONSUMER.MSG.NEXT."):
            self._pull(client, subject.rsplit(".", 1)[1], json.loads(data), reply)
        elif subject.startswith("$JS.API."):
            answer = self._info(subject.split(".")[2:], json.loads(data or b"{}"))
            if answer is not None:
                client.send(reply, [(json.dumps(answer).encode(), {})])
        else:
            self._write(client, subject, data, reply, headers)

    def _led(self, stream: str) -> bool:
        return self.leaderless.get(stream, 0.0) <= self.loop.now

    def _write(self, client: Client, subject: str, data: bytes, reply: str, headers: Headers) -> None:
        ack = self.put(subject, data, headers) if subject.startswith("$KV.") else self.store(subject, data, headers)
        if ack is not None and self.rng.random() >= self.weather.lost_ack:
            client.send(reply, [(json.dumps(ack).encode(), {})])

    def store(self, subject: str, data: bytes, headers: Headers) -> dict[str, Any] | None:
        stream = stream_of(subject)
        if not self._led(stream):
            return None
        known = self.ids.get(headers.get("Nats-Msg-Id", ""))
        if known is not None and self.rng.random() >= self.weather.forget_id:
            return {"stream": stream, "seq": known, "duplicate": True}
        expected = headers.get("Nats-Expected-Last-Subject-Sequence")
        if expected is not None and not self.admits(self.last.get(subject, 0), int(expected)):
            return {"error": {"code": 400, "err_code": 10071, "description": "wrong last sequence"}}
        log, now = self.streams[stream], self.loop.now
        # What the sender wrote is kept, and what the broker adds stands behind it.
        own = {**headers, "Nats-Subject": subject, "Nats-Sequence": str(len(log) + 1), "Nats-Time-Stamp": _stamp(now)}
        # One time, as whoever reads it has it: rounded once.
        record = Record(stream, len(log) + 1, subject, data, milliseconds(_stamp(now)))
        log.append(Stored(record, own))
        self.last[subject] = record.sequence
        if subject in self._awaited:
            self._awaited[subject].set()
        if mid := headers.get("Nats-Msg-Id"):
            self.ids[mid] = record.sequence
        for client in self.clients:
            if self.rng.random() >= self.weather.lost_hint:
                client.hint(stream, record.sequence)
        self._serve(stream)
        return {"stream": stream, "seq": record.sequence}

    def admits(self, last: int, expected: int) -> bool:
        """Compare and set: what makes a fact be written once."""
        return last == expected

    def put(self, subject: str, value: bytes, headers: Headers) -> dict[str, Any] | None:
        bucket = subject.split(".")[1]
        if not self._led(f"KV_{bucket}"):
            return None
        standing = self._key(subject)
        expected = headers.get("Nats-Expected-Last-Subject-Sequence")
        if expected is not None and (standing.sequence if standing else 0) != int(expected):
            return {"error": {"code": 400, "err_code": 10071, "description": "wrong last sequence"}}
        self.written[bucket] += 1
        until = self.loop.now + LEASE_TTL if bucket == "LEASES" else float("inf")
        own = {
            "Nats-Subject": subject,
            "Nats-Sequence": str(self.written[bucket]),
            "Nats-Time-Stamp": _stamp(self.loop.now),
        }
        kept = {name: text for name, text in headers.items() if name == "KV-Operation"}
        self.keys[subject] = Key(value, self.written[bucket], until, own | kept)
        return {"stream": f"KV_{bucket}", "seq": self.written[bucket]}

    def _key(self, subject: str) -> Key | None:
        key = self.keys.get(subject)
        return key if key is not None and key.until > self.loop.now else None

    def _get(self, where: list[str], body: dict[str, Any]) -> list[tuple[bytes, Headers]]:
        """Read directly, from a replica that may be a moment behind."""
        absent = [(b"", {"Status": "404"})]
        if where[0].startswith("KV_"):
            key = self._key(where[1] if len(where) > 1 else body["last_by_subj"])
            return absent if key is None else [(key.value, key.headers)]
        log, behind = self.streams[where[0]], self.rng.random() < self.weather.behind
        log = log[: max(0, len(log) - self.rng.randint(1, 3))] if behind else log
        if "last_by_subj" in body:
            found = [one for one in log if _matches(one.record.subject, body["last_by_subj"])]
            return [(found[-1].record.data, found[-1].headers)] if found else absent
        wanted = [one for one in log[body["seq"] - 1 :] if _matches(one.record.subject, body.get("next_by_subj", ">"))]
        batch = wanted[: body.get("batch", 1)]
        if not batch:
            return absent
        if "batch" not in body:
            return [(batch[0].record.data, batch[0].headers)]
        left = len(wanted) - len(batch)
        messages = [(one.record.data, one.headers) for one in batch]
        return [*messages, (b"", {"Status": "204", "Nats-Num-Pending": str(left)})]

    def _info(self, what: list[str], body: dict[str, Any]) -> dict[str, Any] | None:
        """Answer for a stream, one of its messages, or a consumer: None when nobody does."""
        kind, name = what[0], what[3 if what[1] == "MSG" else 2]
        if not self._led(name):
            return None
        if what[1] == "MSG":
            pattern = body.get("last_by_subj") or body.get("next_by_subj", ">")
            there = any(_matches(one.record.subject, pattern) for one in self.streams[name][body.get("seq", 1) - 1 :])
            return {"message": {}} if there else {"error": {"code": 404, "err_code": 10037}}
        stamp = _stamp(self.loop.now)
        if kind == "CONSUMER":
            queue = self.queues[what[3]]
            return {
                "name": what[3], "stream_name": name, "config": {}, "created": stamp, "num_ack_pending": len(queue.busy),
                "num_waiting": sum(
                    pull.client.reaches and pull.inbox in pull.client.subscriptions and pull.until > self.loop.now
                    for pull in queue.pulls
                ),
                "delivered": {"consumer_seq": queue.given, "stream_seq": queue.next - 1},
                "ack_floor": {"consumer_seq": queue.floor, "stream_seq": queue.floor}, "ts": stamp,
            }  # fmt: skip
        last = len(self.streams.get(name, []))
        state = {"messages": last, "bytes": 0, "first_seq": 1, "last_seq": last, "consumer_count": 0}
        return {"config": {"name": name, "max_msgs_per_subject": 1, "allow_direct": True}, "state": state, "ts": stamp}

    # The work queue

    def _pull(self, client: Client, name: str, body: dict[str, Any], inbox: str) -> None:
        queue = self.queues[name]
        if not self._led(queue.durable.stream):
            return
        pull = Pull(client, inbox, body["batch"], self.loop.now + body["expires"] / 1e9)
        queue.pulls.append(pull)
        self.loop.call_at(pull.until, self._expire, queue, pull, context=self.loop.between)
        self._serve(queue.durable.stream)

    def _expire(self, queue: Queue, pull: Pull) -> None:
        if pull in queue.pulls:
            queue.pulls.remove(pull)
            pull.client.send(pull.inbox, [(b"", {"Status": "408"})])

    def _serve(self, stream: str) -> None:
        for queue in self.queues.values():
            if queue.durable.stream == stream and queue.durable.name == "committer":
                self._serve_queue(queue)

    def _serve_queue(self, queue: Queue) -> None:
        log, now = self.streams[queue.durable.stream], self.loop.now
        while queue.pulls and self.up and len(queue.busy) < queue.durable.max_ack_pending:
            pull = queue.pulls[0]
            if not pull.client.reaches or pull.count == 0:
                queue.pulls.popleft()
                continue
            sequence = queue.due(now, len(log))
            if sequence is None:
                return
            pull.count -= 1
            queue.given += 1
            one = log[sequence - 1]
            place = f"{queue.durable.stream}.{queue.durable.name}.{queue.deliveries[sequence]}.{sequence}.{queue.given}"
            reply = f"$JS.ACK.{place}.{one.record.time_unix_ms * 1_000_000}.{len(log) - sequence}"
            sent = {name: text for name, text in one.headers.items() if name not in ADDED}
            pull.client.send(pull.inbox, [(one.record.data, sent)], one.record.subject, reply)
            self._later(queue, queue.durable.ack_wait)

    def _later(self, queue: Queue, seconds: float) -> None:
        self.loop.call_later(seconds + 0.001, self._serve_queue, queue, context=self.loop.between)

    def _acknowledge(self, place: list[str], word: bytes) -> None:
        queue, sequence = self.queues[place[3]], int(place[5])
        if word.startswith(b"+WPI"):
            if sequence in queue.busy:
                queue.busy[sequence] = self.loop.now + queue.durable.ack_wait
                self._later(queue, queue.durable.ack_wait)
        elif word.startswith(b"-NAK"):
            delay = json.loads(word[5:] or b"{}").get("delay", 0) / 1e9
            if queue.busy.pop(sequence, None) is not None:
                queue.again[sequence] = self.loop.now + delay
                self._later(queue, delay)
        else:
            queue.finish(sequence)
            self._serve_queue(queue)


class Subscription:
    def __init__(self, client: Client, subject: str, callback: Callable[[Msg], Any]) -> None:
        self.client, self.subject = client, subject
        self._waiting: asyncio.Queue[list[Msg]] = asyncio.Queue()
        self._task = asyncio.get_running_loop().create_task(self._run(callback))

    async def _run(self, callback: Callable[[Msg], Any]) -> None:
        while True:
            for msg in await self._waiting.get():
                await callback(msg)

    def take(self, messages: list[Msg]) -> None:
        self._waiting.put_nowait(messages)

    async def unsubscribe(self) -> None:
        self.client.subscriptions.pop(self.subject, None)
        self._task.cancel()


class Client:
    """What a process speaks to the broker with, in place of `nats.aio.client.Client`."""

    def __init__(self, broker: Broker, process: Process) -> None:
        self.broker, self.process, self.loop = broker, process, broker.loop
        self.is_connected = self.is_closed = False
        self.last_error: Exception | None = None
        self._public_nkey: str | None = None
        self.subscriptions: dict[str, Subscription] = {}
        self._answers: dict[str, asyncio.Future[Msg]] = {}
        self._sent = self._came = self._lost_until = 0.0
        self._epoch = self._inboxes = 0
        self._options: dict[str, Any] = {}
        self._context: Context | None = None

    @property
    def reaches(self) -> bool:
        return self.is_connected and not self.process.dead

    def jetstream(self, **options: Any) -> JetStreamContext:
        return JetStreamContext(self, **options)

    async def connect(self, **options: Any) -> None:
        await asyncio.sleep(self._hop())
        if not self.broker.up or self.loop.now < self._lost_until:
            await options["error_cb"](ConnectionRefusedError("refused"))
        self._options, self._context = options, copy_context()
        self._arrive()

    def _arrive(self) -> None:
        self.is_connected = True
        self.broker.clients.append(self)

    async def close(self) -> None:
        self._leave()
        self.is_closed = True

    async def flush(self, timeout: int = 10) -> None:
        await asyncio.sleep(2 * self._hop())

    def _leave(self) -> None:
        self.is_connected = False
        self._epoch += 1
        if self in self.broker.clients:
            self.broker.clients.remove(self)

    def lose(self, seconds: float) -> None:
        """Cut the connection; it comes back by itself once the broker can be reached again."""
        self._lost_until = max(self._lost_until, self.loop.now + seconds)
        if self.is_connected:
            self._leave()
            self._tell("disconnected_cb")
            self._try_again()

    def _try_again(self) -> None:
        self.loop.call_later(0.25, self._return, context=self.loop.between)

    def _return(self) -> None:
        if self.is_closed or self.process.dead:
            return
        if not self.broker.up or self.loop.now < self._lost_until:
            self._try_again()
            return
        self._arrive()
        self._tell("reconnected_cb")

    def _tell(self, callback: str) -> None:
        if not self.process.dead and self._context is not None:
            self.loop.create_task(self._options[callback](), context=self._context)

    # Messages

    def _hop(self) -> float:
        rng = self.process.rng
        return rng.expovariate(250.0) + (rng.uniform(0.2, 3.0) if rng.random() < self.broker.weather.slow else 0.0)

    def new_inbox(self) -> str:
        self._inboxes += 1
        return f"_INBOX.{self._inboxes}"

    async def subscribe(self, subject: str, cb: Callable[[Msg], Any]) -> Subscription:
        self.subscriptions[subject] = Subscription(self, subject, cb)
        return self.subscriptions[subject]

    async def publish(
        self, subject: str, payload: bytes = b"", reply: str = "", headers: Headers | None = None
    ) -> None:
        if self.is_closed or self.process.dead:
            raise ConnectionClosedError
        if not self.is_connected:
            raise OutboundBufferLimitError
        # One connection carries what is said in its order.
        self._sent = max(self._sent, self.loop.now + self._hop())
        args = (self._epoch, subject, payload, reply, headers or {})
        self.loop.call_at(self._sent, self._cross, *args, context=self.loop.between)

    def _cross(self, epoch: int, subject: str, payload: bytes, reply: str, headers: Headers) -> None:
        # On the wire it does not matter any more whether the sender lives.
        if epoch == self._epoch or self.process.dead:
            self.broker.receive(self, subject, payload, reply, headers)

    async def request(
        self, subject: str, payload: bytes = b"", timeout: float = 0.5, headers: Headers | None = None
    ) -> Msg:
        inbox = self.new_inbox()
        answer = self._answers[inbox] = self.loop.create_future()
        timer = self.loop.call_later(timeout, _time_out, answer)
        try:
            await self.publish(subject, payload, inbox, headers)
            return await answer
        finally:
            timer.cancel()
            del self._answers[inbox]

    def send(self, inbox: str, parts: list[tuple[bytes, Headers]], subject: str = "", reply: str = "") -> None:
        """Send messages to this client; what is under way when the connection breaks does not arrive."""
        if not self.reaches or not inbox:
            return
        messages = [Msg(self, subject or inbox, reply, data, headers) for data, headers in parts]
        self._came = max(self._came, self.loop.now + self._hop())
        self.loop.call_at(self._came, self._deliver, self._epoch, inbox, messages, context=self.loop.between)

    def hint(self, stream: str, sequence: int) -> None:
        prefix = f"live.{stream}."
        for subject in self.subscriptions:
            if subject.startswith(prefix):
                self.send(subject, [(b"", {"Nats-Sequence": str(sequence)})])

    def _deliver(self, epoch: int, inbox: str, messages: list[Msg]) -> None:
        if epoch != self._epoch or self.process.dead:
            return
        if (answer := self._answers.get(inbox)) is not None:
            if not answer.done():
                answer.set_result(messages[0])
        elif (subscription := self.subscriptions.get(inbox)) is not None:
            subscription.take(messages)


def _time_out(answer: asyncio.Future[Msg]) -> None:
    if not answer.done():
        answer.set_exception(NatsTimeoutError())
