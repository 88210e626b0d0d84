"""Every stream, durable consumer and bucket, declared once. `ensure` creates them; services never do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nats.errors import NoRespondersError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext, api
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from connito.errors import Invalid, Retry
from connito.wire.parts import MAX_FACT_BYTES
from connito.wire.subjects import DLQ_ROOT, ROOT, SECURITY_ROOT, check_token

LEASES = "LEASES"
ENDPOINTS = "ENDPOINTS"
SUSPECTS = "SUSPECTS"
SUSPECTED_SECONDS = 7 * 86400.0
LEASE_TTL = 3.0


@dataclass(frozen=True)
class Stream:
    """`subject` has `{run}` where a reader of one run puts its id and everyone else `*`."""

    name: str
    subject: str
    # The log is the truth: what was said stays said.
    append_only: bool = True
    max_message_bytes: int = 1 << 20
    # A miner writes to its own subjects only; this bounds what one key can store there.
    max_per_subject: int = -1
    # Subjects that are stored too, and not followed.
    beside: tuple[str, ...] = ()
    # What is said of all who take part, where the stream has an answer for each of them too.
    of_all: str = ""

    def filter(self, run: str = "", *, of_all: bool = False) -> str:
        """Return the subject filter for one run, or for all; `of_all`: without answers to one miner, and without parts of facts.
        Raises `Invalid` for what cannot be a run's id.
        """
        subject = (of_all and self.of_all) or self.subject
        return subject.format(run=check_token(run, "run id") if run else "*")


def live(stream: str, subject: str) -> str:
    """Return where the broker hints at what it has just stored: who hears it looks into the stream."""
    return f"live.{stream}.{subject}"


@dataclass(frozen=True)
class Durable:
    """A work queue: replicas of one service share it."""

    name: str
    stream: str
    subject: str
    ack_wait: float
    max_ack_pending: int = -1


def _answers(name: str) -> Stream:
    """Return the stream of a window in which each miner is answered."""
    window = f"{ROOT}.{{run}}.{name.lower()}"
    return Stream(name, f"{window}.>", max_message_bytes=MAX_FACT_BYTES, of_all=f"{window}.*.*")


STREAMS: dict[str, Stream] = {
    stream.name: stream
    for stream in (
        Stream("RUNS", f"{ROOT}.{{run}}.run.>", max_message_bytes=MAX_FACT_BYTES),
        Stream("TRAIN", f"{ROOT}.{{run}}.train.>", max_message_bytes=MAX_FACT_BYTES),
        _answers("COMMIT"),
        _answers("SUBMIT"),
        Stream("VALIDATE", f"{ROOT}.{{run}}.validate.>", max_message_bytes=MAX_FACT_BYTES),
        Stream("MERGE", f"{ROOT}.{{run}}.merge.>", max_message_bytes=MAX_FACT_BYTES),
        Stream("LIBRARY", f"{ROOT}.{{run}}.library.>", max_message_bytes=MAX_FACT_BYTES),
        Stream("INGRESS", f"{ROOT}.{{run}}.ingress.*.*", max_message_bytes=1 << 12, max_per_subject=100_000),
        Stream("DLQ", f"{DLQ_ROOT}.>", append_only=False, max_message_bytes=1 << 20),
        Stream(
            "ADVISORIES",
            f"{SECURITY_ROOT}.>",
            append_only=False,
            max_message_bytes=1 << 12,
            max_per_subject=1_000,
            beside=("$JS.EVENT.ADVISORY.CONSUMER.>",),
        ),
    )
}

# What a follower of a whole run reads. No message there grows with those who take part (`connito.wire.parts`).
FACT_STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE", "LIBRARY")

# What an archive takes over; a run's frame and its experts stay.
RELEASED = ("TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE", "INGRESS")

DURABLES: dict[str, Durable] = {
    durable.name: durable
    for durable in (
        # One replica draws many, and handles those of each key in order.
        Durable("committer", "INGRESS", STREAMS["INGRESS"].filter(), ack_wait=5.0, max_ack_pending=10_000),
        Durable("selector", "RUNS", f"{ROOT}.*.run.0.created", ack_wait=10.0),
        Durable("library", "RUNS", f"{ROOT}.*.run.0.ended", ack_wait=10.0),
    )
}


def stream_of(subject: str) -> str:
    """Return the stream that stores `subject`. Raises `Invalid` if none does."""
    if subject.startswith(DLQ_ROOT + "."):
        return "DLQ"
    if subject.startswith(SECURITY_ROOT + "."):
        return "ADVISORIES"
    parts = subject.split(".")
    section = parts[3] if len(parts) > 4 and ".".join(parts[:2]) == ROOT else ""
    name = "RUNS" if section == "run" else section.upper()
    if name not in STREAMS:
        raise Invalid(f"no stream stores {subject!r}")
    return name


async def ensure(
    js: JetStreamContext, replicas: int = 1, *, lease_ttl: float = LEASE_TTL, max_bytes: int = -1
) -> list[str]:
    """Create or update everything declared here; safe to repeat. Returns the names. `max_bytes` limits each stream.

    Raises `Retry` when the broker is away or has no JetStream (yet), `Invalid` when it refuses a declaration.
    """
    try:
        for stream in STREAMS.values():
            await _ensure_stream(js, _stream_config(stream, replicas, max_bytes))
        for bucket, ttl in ((LEASES, lease_ttl), (ENDPOINTS, None), (SUSPECTS, SUSPECTED_SECONDS)):
            await _ensure_stream(js, _bucket_config(bucket, ttl, replicas))
        for durable in DURABLES.values():
            await js.add_consumer(durable.stream, _durable_config(durable))
    except (ServiceUnavailableError, NoRespondersError, NatsTimeoutError) as error:
        raise Retry("the broker does not answer JetStream requests; is it up, and JetStream enabled in it?") from error
    except APIError as error:
        raise Invalid(f"the broker refuses a declaration: {error.description}") from error
    return [*STREAMS, LEASES, ENDPOINTS, SUSPECTS, *DURABLES]


async def describe(js: JetStreamContext) -> list[dict[str, Any]]:
    """Return messages, bytes and consumers of each declared stream; `exists` is false for those that are missing."""
    rows: list[dict[str, Any]] = []
    for name, stream in STREAMS.items():
        try:
            info = await js.stream_info(name)
        except NotFoundError:
            rows.append({"name": name, "subject": stream.filter(), "exists": False})
            continue
        rows.append(
            {
                "name": name,
                "subject": stream.filter(),
                "exists": True,
                "messages": info.state.messages,
                "bytes": info.state.bytes,
                "last_sequence": info.state.last_seq,
                "consumers": info.state.consumer_count,
            }
        )
    return rows


def _stream_config(stream: Stream, replicas: int, max_bytes: int) -> api.StreamConfig:
    return api.StreamConfig(
        name=stream.name,
        subjects=[stream.filter(), *stream.beside],
        storage=api.StorageType.FILE,
        retention=api.RetentionPolicy.LIMITS,
        # A full log refuses; it never forgets what was acknowledged.
        discard=api.DiscardPolicy.NEW if stream.append_only else api.DiscardPolicy.OLD,
        discard_new_per_subject=stream.append_only and stream.max_per_subject > 0,
        max_msgs_per_subject=stream.max_per_subject,
        max_msg_size=stream.max_message_bytes + (1 << 12),
        max_bytes=max_bytes,
        max_age=None if stream.append_only else 30 * 86400.0,
        num_replicas=replicas,
        duplicate_window=120,
        deny_delete=stream.append_only,
        allow_direct=True,
        republish=api.RePublish(src=">", dest=live(stream.name, ">"), headers_only=True),
    )


def _bucket_config(bucket: str, ttl: float | None, replicas: int) -> api.StreamConfig:
    return api.StreamConfig(
        name=f"KV_{bucket}",
        subjects=[f"$KV.{bucket}.>"],
        storage=api.StorageType.FILE,
        discard=api.DiscardPolicy.NEW,
        max_msgs_per_subject=1,
        max_age=ttl,
        duplicate_window=min(ttl or 120, 120),
        num_replicas=replicas,
        deny_delete=True,
        allow_rollup_hdrs=True,
        allow_direct=True,
    )


def _durable_config(durable: Durable) -> api.ConsumerConfig:
    return api.ConsumerConfig(
        durable_name=durable.name,
        name=durable.name,
        filter_subject=durable.subject,
        ack_policy=api.AckPolicy.EXPLICIT,
        ack_wait=durable.ack_wait,
        max_ack_pending=durable.max_ack_pending,
        max_deliver=-1,
    )


async def _ensure_stream(js: JetStreamContext, config: api.StreamConfig) -> None:
    try:
        await js.update_stream(config)
    except NotFoundError:
        await js.add_stream(config)


async def release(js: JetStreamContext, run: str, names: Sequence[str] = RELEASED) -> None:
    """Drop a run's windows, and what its miners said, from the streams. For the operator, who has them in an archive, or
    drops what was said of a run that does not exist. Raises `Invalid` where the broker refuses.
    """
    for name in names:
        try:
            await js.purge_stream(name, subject=STREAMS[name].filter(run))
        except APIError as error:
            raise Invalid(f"stream {name} does not let {run} go: {error.description}") from error
