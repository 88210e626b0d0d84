"""Hash several fields without ambiguity."""

from __future__ import annotations

import hashlib


def is_digest(text: str) -> bool:
    """Return whether `text` is a SHA-256 in lower-case hex."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def hash_fields(tag: bytes, *fields: str | int | bytes) -> bytes:
    """Return SHA-256 over a domain tag and fields, each behind its length (4 bytes, big-endian).

    The lengths make it injective: no two different lists of fields have the same input, as they would when joined.
    Text is UTF-8, numbers are decimal text.
    """
    state = hashlib.sha256()
    for field in (tag, *fields):
        raw = field if isinstance(field, bytes) else str(field).encode()
        state.update(len(raw).to_bytes(4, "big") + raw)
    return state.digest()
