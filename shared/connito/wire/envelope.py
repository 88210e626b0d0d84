"""Signing messages and opening them again, over the bytes as they are stored."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons
from connito.v1.envelope_pb2 import Envelope
from connito.wire.identity import Identity, short_key, verify

SCHEMA_VERSION = 1
MAX_ENVELOPE_BYTES = 1 << 20
# A fact with a payload that came in parts, put together.
MAX_WHOLE_BYTES = 1 << 28

M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Opened:
    """An envelope whose signature holds for the subject it came on."""

    type_name: str
    payload: bytes
    signer: str
    issued_at_unix_ms: int
    # Whether the payload is there, and not in parts.
    here: bool = True

    def read(self, message_type: type[M]) -> M:
        """Parse the payload. Raises `Invalid` when the envelope declares another type or the bytes do not parse."""
        expected = message_type.DESCRIPTOR.full_name
        if self.type_name != expected:
            raise Invalid(
                f"expected a {expected}, got {self.type_name or 'no type'}", reason=reasons.REASON_UNKNOWN_TYPE
            )
        if not self.here:
            raise Invalid(f"the parts that hold this {expected} are not here")
        try:
            return message_type.FromString(self.payload)
        except DecodeError as error:
            raise Invalid(f"the payload is not a {expected}: {error}") from error


def _signed_bytes(envelope: Envelope, subject: str) -> bytes:
    parts = (
        str(envelope.schema_version).encode(),
        subject.encode(),
        envelope.type.encode(),
        envelope.nonce,
        str(envelope.issued_at_unix_ms).encode(),
        envelope.payload_digest or hashlib.sha256(envelope.payload).digest(),
    )
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def seal(
    identity: Identity, subject: str, message: Message, *, now_ms: int | None = None, nonce: bytes = b""
) -> Envelope:
    """Wrap and sign `message` for `subject`. The envelope verifies on that subject only. `nonce`: 16 random bytes."""
    envelope = Envelope(
        schema_version=SCHEMA_VERSION,
        type=message.DESCRIPTOR.full_name,
        payload=message.SerializeToString(),
        signer=identity.public,
        nonce=nonce or os.urandom(16),
        issued_at_unix_ms=now_ms if now_ms is not None else time.time_ns() // 1_000_000,
    )
    envelope.signature = identity.sign(_signed_bytes(envelope, subject))
    return envelope


def check(envelope: Envelope, subject: str) -> Opened:
    """Verify an envelope against the subject it came on. Raises `Invalid` with the reason that applies."""
    if envelope.schema_version != SCHEMA_VERSION:
        raise Invalid(
            f"schema version {envelope.schema_version} is not supported here (this side speaks {SCHEMA_VERSION}); "
            "upgrade the older side",
            reason=reasons.REASON_UNSUPPORTED_SCHEMA,
        )
    if len(envelope.nonce) != 16:
        raise Invalid("the envelope's nonce is not 16 bytes")
    if envelope.payload_digest and (envelope.payload or len(envelope.payload_digest) != 32):
        raise Invalid("the envelope has a payload and another one's digest, or no digest of 32 bytes")
    if not verify(envelope.signer, _signed_bytes(envelope, subject), envelope.signature):
        raise Invalid(
            f"the signature does not hold for signer {short_key(envelope.signer)} on {subject}",
            reason=reasons.REASON_BAD_SIGNATURE,
        )
    here = not envelope.payload_digest
    return Opened(envelope.type, envelope.payload, envelope.signer, envelope.issued_at_unix_ms, here)


def open_bytes(data: bytes, subject: str, limit: int = MAX_ENVELOPE_BYTES) -> Opened:
    """Parse and verify what came over the bus. Raises `Invalid` with the reason that applies."""
    if len(data) > limit:
        raise Invalid(
            f"an envelope of {len(data)} bytes is over the {limit} byte limit",
            reason=reasons.REASON_OVERSIZED,
        )
    try:
        envelope = Envelope.FromString(data)
    except DecodeError as error:
        raise Invalid(f"not an envelope: {error}") from error
    return check(envelope, subject)
