"""The bus as services use it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from types import TracebackType
from typing import Any, Protocol, Self

from google.protobuf.message import Message
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import NotFoundError

from connito.bus.absent import gone, parts_at
from connito.bus.connection import Connection, speaking
from connito.bus.consume import Worker
from connito.bus.follow import CaughtUp, follow, got, hear, in_whole, milliseconds
from connito.bus.offences import report
from connito.bus.streams import DURABLES, ENDPOINTS, FACT_STREAMS, STREAMS, stream_of
from connito.errors import Fatal, Invalid, Retry
from connito.runtime import metrics, tracing
from connito.runtime.host import HOST, Host
from connito.runtime.logs import current, get_logger, inject
from connito.v1 import reasons_pb2 as reasons
from connito.v1.cycle_pb2 import DeadLetter, SecurityEvent
from connito.v1.envelope_pb2 import Envelope
from connito.wire import subjects
from connito.wire.envelope import MAX_ENVELOPE_BYTES, open_bytes, seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.parts import join, parts_of, read_part, split
from connito.wire.roster import Roster
from connito.wire.tls import PLAIN, Tls
from connito.wire.verification import verify_fact

log = get_logger("bus")

_WRONG_LAST_SEQUENCE = (10071, 10164)
PUBLISH_SECONDS = 8.0
# A broker that starts, or elects, answers sooner than this.
STORED_PATIENCE = 30.0


class _HasNatsUrl(Protocol):
    @property
    def nats_url(self) -> str: ...


class Bus:
    """A connection to the log. Make one with `await Bus.connect(...)`; it is an async context manager."""

    def __init__(
        self, connection: Connection, reading: Connection, roster: Roster | None = None, host: Host = HOST
    ) -> None:
        # `connection` is also there for the broker's own API.
        self.connection, self._reading = connection, reading
        self._roster, self.host = roster, host

    @classmethod
    async def connect(
        cls,
        settings_or_url: _HasNatsUrl | str,
        identity: Identity | None,
        name: str,
        roster: Roster | None = None,
        tls: Tls | None = None,
    ) -> Self:
        """Log in with the identity's key and passes, or without. Who has two passes speaks and reads in accounts apart,
        over a connection each. With a roster, what someone without the role wrote keeps no author from writing it.

        Raises `Retry` when the broker is away and `Invalid` when it refuses the key. Later the connection comes back
        by itself, however long the broker is away.
        """
        url = settings_or_url if isinstance(settings_or_url, str) else settings_or_url.nats_url
        tls = tls if tls is not None else getattr(settings_or_url, "tls", PLAIN)
        assert isinstance(tls, Tls)
        passes = speaking(identity.passes) if identity is not None else ()
        connections = [Connection(url, identity, name, tls, token) for token in passes or ("",)]
        async with AsyncExitStack() as opened:
            for connection in connections:
                await connection.open()
                opened.push_async_callback(connection.close)
            opened.pop_all()
        return cls(connections[0], connections[-1], roster)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Flush and disconnect. Followers and consumers should have been cancelled before."""
        for connection in {self.connection, self._reading}:
            await connection.close()

    @property
    def connected(self) -> bool:
        """Return whether the broker is there right now."""
        return self.connection.connected and self._reading.connected

    @property
    def identity(self) -> Identity:
        """Return the identity that signs. Raises `Fatal` on a connection without a key."""
        if self.connection.identity is None:
            raise Fatal("this connection has no key to sign with; set CONNITO_KEY_FILE")
        return self.connection.identity

    @property
    def tls(self) -> Tls:
        """Return how this process speaks TLS: with the bus, and with the APIs that it finds there."""
        return self.connection.tls

    @property
    def js(self) -> JetStreamContext:
        """Return JetStream itself, for declaring streams."""
        return self.connection.js

    # Writing.

    async def publish_fact(
        self, run: str, section: str, cycle: int, kind: str, message: Message, id_: str = ""
    ) -> bool:
        """Sign and write a fact. True: it stands as written here. False: another message stands on that subject.

        Raises `Retry` when no acknowledgement came (it may or may not have been written; writing it again is safe)
        and `Invalid` when this key may not write there or the message is too large.
        """
        subject = subjects.fact(run, section, cycle, kind, id_)
        parts, head = split(subject, self.seal(subject, message))
        for place, part in parts:
            await self._publish_once(place, self._sealed(place, part), f"{section}.part")
        return await self._publish_once(subject, head.SerializeToString(), f"{section}.{kind}")

    async def publish_ingress(self, run: str, kind: str, message: Message) -> int:
        """Sign and send what a miner says; its key names the subject. Returns the sequence in INGRESS.

        Raises as `publish_fact`. After `Retry`, sending again may store it a second time; the first one stands.
        """
        subject = subjects.ingress(run, self.identity.public, kind)
        ack = await self._publish(subject, self._sealed(subject, message), {}, f"ingress.{kind}")
        return int(ack["seq"])

    async def publish_security(self, event: SecurityEvent) -> None:
        """Tell the operator. Raises `Retry`, and `Invalid` for a key that is no service's: asking would count as its offence."""
        if self._roster is not None and not self._roster.serves(self.identity.public):
            raise Invalid("the broker does not let a key report that is no service's in the roster")
        subject = f"{subjects.SECURITY_ROOT}.{subjects.check_token(event.kind, 'kind')}.{self.identity.public}"
        await self._publish(subject, self._sealed(subject, event), {}, "security")

    def seal(self, subject: str, message: Message) -> Envelope:
        """Sign a message for a subject, or for the `rpc.` name of a call."""
        return seal(self.identity, subject, message, now_ms=self.host.now_ms(), nonce=self.host.entropy(16))

    def _sealed(self, subject: str, message: Message) -> bytes:
        data = self.seal(subject, message).SerializeToString()
        if len(data) > MAX_ENVELOPE_BYTES:
            raise Invalid(
                f"{subject} would be {len(data)} bytes, over the limit of {MAX_ENVELOPE_BYTES}; put the bulk of it in "
                "an artifact",
                reason=reasons.REASON_OVERSIZED,
            )
        return data

    async def _publish_once(self, subject: str, data: bytes, kind: str, after: int = 0) -> bool:
        try:
            await self._publish(subject, data, {"Nats-Expected-Last-Subject-Sequence": str(after)}, kind)
        except _SubjectTakenError:
            return await self._settle(subject, data, kind)
        return True

    async def _settle(self, subject: str, data: bytes, kind: str) -> bool:
        """Resolve a subject that already has a message: our own (its acknowledgement was lost), another's, or an invalid one."""
        standing = await self.look(stream_of(subject), last_by_subj=subject)
        if standing is None or standing.data == data:
            if standing is None:
                raise Retry(
                    f"{subject} was taken and is empty again; the broker is still recovering", dependency="broker"
                )
            return True
        try:
            await self._verify(standing)
        except Invalid as error:
            log.error(
                "a message without authority stood on the subject of a fact, writing after it", security=True,
                subject=subject, sequence=standing.sequence, error=str(error),
            )  # fmt: skip
            report("squatted_subject", subject=subject, reason=error.reason, detail=str(error))
            return await self._publish_once(subject, data, kind, after=standing.sequence)
        metrics.EVENTS_PUBLISHED.labels(kind, "stood").inc()
        return False

    async def _verify(self, record: Record) -> None:
        if self._roster is None or record.stream not in FACT_STREAMS:
            open_bytes(record.data, record.subject)
        elif subjects.parse_part(record.subject) is not None:
            read_part(record, self._roster)
        else:
            verify_fact(await self.whole(record), self._roster)

    async def _publish(self, subject: str, data: bytes, extra: dict[str, str], kind: str) -> dict[str, Any]:
        """Send the same bytes until they are acknowledged, for at most `PUBLISH_SECONDS`."""
        with tracing.span(f"publish {kind}", "PRODUCER", current(), system="nats", destination_name=subject):
            return await self._send(subject, data, extra, kind)

    async def _send(self, subject: str, data: bytes, extra: dict[str, str], kind: str) -> dict[str, Any]:
        headers = inject({"Nats-Msg-Id": hashlib.sha256(data).hexdigest(), **extra})
        give_up, attempt = self.host.monotonic() + PUBLISH_SECONDS, 0
        while True:
            attempt += 1
            try:
                with metrics.PUBLISH_SECONDS.time():
                    msg = await self.connection.request(subject, data, headers)
                ack = self._read_ack(json.loads(msg.data), subject)
            except Retry as error:
                if self.host.monotonic() + error.after > give_up:
                    metrics.EVENTS_PUBLISHED.labels(kind, "retry").inc()
                    raise
                await asyncio.sleep(error.after)
                continue
            except Invalid:
                metrics.EVENTS_PUBLISHED.labels(kind, "denied").inc()
                raise
            if ack.get("duplicate") and attempt == 1:
                # The id is the hash of bytes that only we could make: someone replayed our message before we sent it.
                log.error("the broker took a new message for a duplicate", security=True, subject=subject)
                report(
                    "unexpected_duplicate", subject=subject, detail="somebody had used the id of this message before"
                )
                # What is under that id is not on record as ours; without an id the broker compares nothing.
                headers.pop("Nats-Msg-Id")
                continue
            metrics.EVENTS_PUBLISHED.labels(kind, "written").inc()
            return ack

    def _read_ack(self, ack: dict[str, Any], subject: str) -> dict[str, Any]:
        error = ack.get("error")
        if error is None:
            return ack
        if error.get("err_code") in _WRONG_LAST_SEQUENCE:
            raise _SubjectTakenError
        description = error.get("description", "")
        if error.get("err_code") == 10054:
            raise Invalid(f"the broker finds {subject} too large: {description}", reason=reasons.REASON_OVERSIZED)
        if "maximum messages per subject" in description:
            raise Invalid(f"{subject} is full: {description}", reason=reasons.REASON_QUOTA_EXCEEDED)
        raise Retry(f"the broker cannot store {subject}: {description}", dependency="broker")

    # Reading.

    def follow(
        self, streams: Sequence[str], run: str = "", *, start: Mapping[str, int] | None = None, of_all: bool = False
    ) -> AsyncGenerator[Record | CaughtUp, None]:
        """Yield the records of `streams` (of one run, or of all), from the beginning or from the sequences in `start`.

        In order per stream, each message once; yields `CaughtUp` once, when everything that was stored at the start
        has been delivered. Goes on for ever, through restarts and stalls of the broker. Raises `Invalid` when this key
        may not read, `Fatal` when the broker closes the connection for good. `of_all`: no answers to single miners.
        """
        items = follow(self._reading, streams, run, dict(start or {}), of_all=of_all)
        return in_whole(items, self.whole) if of_all else items

    async def hear(self, stream: str, subject: str, heard: Callable[[], None]) -> None:
        """Call `heard` when something may have been stored on a subject, which may have wildcards. Raises `Retry`."""
        await hear(self._reading, stream, subject, heard)

    async def stored(self, streams: Sequence[str], run: str = "") -> AsyncGenerator[Record, None]:
        """Yield what is stored in `streams` now, as `follow` does, and end. Raises `Retry` for one that is away for long."""
        async with aclosing(follow(self._reading, streams, run, {}, patience=STORED_PATIENCE)) as items:
            async for item in items:
                if isinstance(item, CaughtUp):
                    return
                yield item

    async def consume(
        self,
        durable: str,
        handler: Callable[[Record], Awaitable[None]],
        *,
        concurrency: int = 1,
        heartbeat: float | None = None,
        lane: Callable[[Record], str] | None = None,
        skip: Callable[[Record], bool] | None = None,
        aside: Callable[[Record, Invalid], Awaitable[None]] | None = None,
    ) -> None:
        """Process a durable consumer's messages until cancelled, `concurrency` at once.

        `Retry` from the handler: again after a growing delay. `Invalid`: a signed copy to the DLQ, and done. `Fatal` is raised
        here. Anything else: again, and after a few times as `Invalid`. Every `heartbeat` seconds the broker hears what is here.

        Without `lane` every replica takes a share. With it, messages of one lane are handled one at a time and in order;
        then one replica may consume at a time (`Lease`). What `skip` says so of is done without being handled.
        `aside` is told of a message whose handler failed, or ended the process, too often, before its dead letter is written.
        """

        async def handle(record: Record) -> None:
            await handler(await self.whole(record))

        beat = heartbeat if heartbeat is not None else DURABLES[durable].ack_wait / 3
        worker = Worker(self.connection, durable, handle, self._dead_letter, beat, concurrency, lane, skip, aside)
        await worker.run()

    async def _dead_letter(self, letter: DeadLetter) -> None:
        subject = f"{subjects.DLQ_ROOT}.{letter.stream}.{letter.sequence}"
        await self._publish_once(subject, self._sealed(subject, letter), "dlq")

    async def last_record(self, subject: str) -> Record | None:
        """Return the last message on a subject, a fact as a whole, or None. Raises `Invalid` for a fact without its parts."""
        record = await self.look(stream_of(subject), last_by_subj=subject)
        return None if record is None else await self.whole(record)

    async def whole(self, record: Record) -> Record:
        """Return a fact with its payload, also where that lies in parts in front of it. Raises `Invalid` where they do not."""
        places = parts_of(record) if record.stream in FACT_STREAMS else []
        return (
            join(record, await parts_at(self.look, self._reading, record, places, self._roster)) if places else record
        )

    async def last_sequence(self, stream: str) -> int:
        """Return the sequence of the last message that `stream` stored; 0 when it is empty."""
        if self._reading.stranger:
            # Strangers ask no leader: a replica answers, which may be some milliseconds behind.
            last = await self.look(stream, last_by_subj=STREAMS[stream].filter())
            return 0 if last is None else last.sequence
        return int((await self.manage(self.js.stream_info(stream), f"stream {stream}")).state.last_seq)

    async def look(self, stream: str, **which: object) -> Record | None:
        """Return the message that stands at `seq`, or as the last one on `last_by_subj`; None where none does. Raises `Retry`."""
        body = json.dumps(which).encode()
        reply = await self._reading.request(self._reading.stored_in(stream), body)
        if (record := got(stream, reply)) is not None:
            return record
        if (status := (reply.headers or {}).get("Status")) == "404":
            return None
        raise Retry(f"the broker cannot read {which} of {stream}: it answers {status}", dependency="broker")

    @property
    def stranger(self) -> bool:
        """Return whether this side may ask no leader of a stream."""
        return self._reading.stranger

    async def gone(self, stream: str, **which: object) -> bool:
        """Return whether the stream's leader, which is never behind, has no such message (as in `look`). For services."""
        return await gone(self._reading, stream, which)

    async def time(self) -> float:
        """Return the broker's clock, in unix seconds. Raises `Retry` when it does not answer."""
        reply = await self.connection.request("$JS.API.STREAM.INFO.RUNS", b"")
        stamp = str(json.loads(reply.data).get("ts", ""))
        if not stamp:
            raise Retry("the broker's clock cannot be read; run `connito streams ensure`", dependency="broker")
        return milliseconds(stamp) / 1000

    async def ack_floor(self, durable: str) -> int:
        """Return the stream sequence up to which everything for this durable consumer has been handled."""
        info = await self.manage(self.js.consumer_info(DURABLES[durable].stream, durable), f"consumer {durable}")
        return int(info.ack_floor.stream_seq) if info.ack_floor else 0

    async def manage(self, call: Awaitable[Any], what: str) -> Any:
        """Return what a question about a stream or a consumer is answered. Raises it explained."""
        try:
            return await call
        except NotFoundError as error:
            raise Retry(f"the broker has no {what}; run `connito streams ensure`", dependency="broker") from error
        except (TimeoutError, NatsError, OSError) as error:
            raise self.connection.explain(error, what) from error

    # Finding each other.

    async def register_endpoint(self, name: str, address: str) -> None:
        """Say where the API of `name` is reached (host:port)."""
        subject = f"$KV.{ENDPOINTS}.{name}"
        reply = await self.connection.request(subject, address.encode())
        self._read_ack(json.loads(reply.data), subject)

    async def find_endpoint(self, name: str, timeout: float = 30.0) -> str:
        """Return the address of the API of `name`, waiting until it is known. Raises `Retry` after `timeout` seconds."""
        subject = f"$JS.API.DIRECT.GET.KV_{ENDPOINTS}.$KV.{ENDPOINTS}.{subjects.check_token(name, 'service')}"
        give_up = self.host.monotonic() + timeout
        while True:
            problem = Retry(f"no {name} has registered its address; is the {name} service running?")
            try:
                found = await self._reading.request(subject, b"")
                if "Nats-Subject" in (found.headers or {}) and found.data:
                    return bytes(found.data).decode()
            except Retry as error:
                problem = error
            if self.host.monotonic() >= give_up:
                raise problem
            await asyncio.sleep(0.1)


class _SubjectTakenError(Exception):
    """A message stands on the subject already."""
