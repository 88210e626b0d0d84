"""Facts whose payload one message does not hold: it stands in parts in front of the fact, in the same stream.

No message of the log grows with the number of those who take part. A fact of up to `MAX_FACT_BYTES` is one message. A larger one
is an envelope with the SHA-256 of its payload, which its signature covers either way, and its payload lies in signed parts on
subjects named after that digest. Whoever reads a stream in order has read the parts when the fact comes: whether a fact can be
read is decided by the log alone, for every reader alike, and asks no store for anything (docs/adr/0018-no-fact-grows.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from google.protobuf.message import DecodeError

from connito.errors import Invalid
from connito.v1 import reasons_pb2
from connito.v1.envelope_pb2 import Envelope, FactPart
from connito.wire.envelope import MAX_ENVELOPE_BYTES, MAX_WHOLE_BYTES, open_bytes
from connito.wire.fact import Record
from connito.wire.roster import Roster
from connito.wire.subjects import is_ingress, parse_fact, parse_part, part
from connito.wire.verification import LARGE, by_participant, open_fact

# A message of the log, and a part's share of a payload, which leaves room for its envelope.
MAX_FACT_BYTES, PART_BYTES = 1 << 16, 60_000


def limit_of(subject: str) -> int:
    """Return how many bytes a fact may have as a whole: of a participant, as many as one message of the broker has."""
    _, key = parse_fact(subject)
    if (key.section, key.kind) not in LARGE:
        return MAX_FACT_BYTES
    return MAX_ENVELOPE_BYTES if by_participant(subject) else MAX_WHOLE_BYTES


def split(subject: str, whole: Envelope) -> tuple[list[tuple[str, FactPart]], Envelope]:
    """Return the parts to write in front of a fact, each with its subject, and the envelope to write then.

    A fact that one message holds has none. Raises `Invalid` (OVERSIZED) for one that is too large as a whole.
    """
    size, limit = whole.ByteSize(), limit_of(subject)
    if size > limit:
        raise Invalid(
            f"{subject} would be {size} bytes, over the limit of {limit}; put the bulk of it in an artifact",
            reason=reasons_pb2.REASON_OVERSIZED,
        )
    if size <= MAX_FACT_BYTES:
        return [], whole
    payload, head = whole.payload, Envelope()
    digest = hashlib.sha256(payload)
    pieces = [payload[start : start + PART_BYTES] for start in range(0, len(payload), PART_BYTES)]
    head.CopyFrom(whole)
    head.ClearField("payload")
    head.payload_digest, head.payload_parts = digest.digest(), len(pieces)
    named = [(part(subject, digest.hexdigest(), number), FactPart(data=data)) for number, data in enumerate(pieces)]
    return named, head


def parts_of(record: Record) -> list[str]:
    """Return the subjects of the parts that hold a fact's payload; none for a fact that is one message."""
    head = _head(record)
    if head is None:
        return []
    if head.payload_parts > MAX_WHOLE_BYTES // PART_BYTES + 1:
        raise Invalid(f"{record.subject} claims {head.payload_parts} parts", reason=reasons_pb2.REASON_OVERSIZED)
    return [part(record.subject, head.payload_digest.hex(), number) for number in range(head.payload_parts)]


def join(record: Record, data: Iterable[bytes]) -> Record:
    """Return a fact with its payload in its envelope. Where `data` is another, its signature does not hold."""
    whole = _head(record)
    assert whole is not None, f"{record.subject} is one message"
    if whole.payload:
        raise Invalid(f"{record.subject} has a payload and another one's digest")
    whole.payload = b"".join(data)
    whole.ClearField("payload_digest")
    whole.ClearField("payload_parts")
    return replace(record, data=whole.SerializeToString())


def read_part(record: Record, roster: Roster | None) -> bytes:
    """Return what a part holds. With a roster its signer must be entitled to the fact. Raises `Invalid`."""
    named = parse_part(record.subject)
    assert named is not None, f"{record.subject} is no part"
    _, key = parse_fact(named[0])
    if (key.section, key.kind) not in LARGE:
        raise Invalid(f"{key.section}.{key.kind} has no parts")
    opened = open_fact(record, key, roster) if roster is not None else open_bytes(record.data, record.subject)
    return opened.read(FactPart).data


@dataclass
class Parts:
    """Parts that were read and whose fact has not come yet: by the fact's subject, then by their own."""

    waiting: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def take(self, record: Record, roster: Roster) -> Record | None:
        """Return a fact as a whole; None for a part, which is kept until its fact comes.

        Read a stream in order. Raises `Invalid` for a part that does not verify or is one too many, and for a fact without
        all of its parts.
        """
        if is_ingress(record.subject):
            return record
        named = parse_part(record.subject)
        if named is None:
            return self._whole(record, parts_of(record))
        data = read_part(record, roster)
        if by_participant(named[0]) and named[0] not in self.waiting:
            self._forget_others(named[0])
        kept = self.waiting.setdefault(named[0], {})
        # What a writer that died left behind may lie there too.
        if sum(map(len, kept.values())) + len(data) > 2 * limit_of(named[0]):
            raise Invalid(f"{named[0]} has more parts than it may have", reason=reasons_pb2.REASON_OVERSIZED)
        kept.setdefault(record.subject, data)
        return None

    def _forget_others(self, subject: str) -> None:
        """Let a participant's parts wait for one fact of a kind in a run, or parts without facts would fill readers."""
        run, key = parse_fact(subject)
        for other in list(self.waiting):
            its_run, its = parse_fact(other)
            if (its_run, its.section, its.kind, its.id) == (run, key.section, key.kind, key.id):
                del self.waiting[other]

    def _whole(self, record: Record, wanted: list[str]) -> Record:
        if not wanted:
            return record
        kept = self.waiting.get(record.subject, {})
        if missing := [subject for subject in wanted if subject not in kept]:
            raise Invalid(f"{record.subject} lacks {len(missing)} of its {len(wanted)} parts")
        whole = join(record, (kept[subject] for subject in wanted))
        del self.waiting[record.subject]
        return whole


def _head(record: Record) -> Envelope | None:
    """Return the envelope of a fact whose payload is in parts."""
    if len(record.data) > MAX_FACT_BYTES:
        return None
    try:
        envelope = Envelope.FromString(record.data)
    except DecodeError as error:
        raise Invalid(f"not an envelope: {error}") from error
    return envelope if envelope.payload_digest else None
