"""Commitment that a miner publishes before it reveals its work: a salted hash that only its owner can open.

The miner's key is inside the hash. Whoever publishes somebody else's commitment as its own has published something
that opens to nothing.
"""

from __future__ import annotations

import hmac
import re

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons
from connito.wire.hashing import hash_fields

TAG = b"connito.v1.commitment"
MIN_SALT_BYTES = 16
MAX_SALT_BYTES = 64
_DIGEST = re.compile(r"[0-9a-f]{64}")


def commitment_digest(
    run: str, cycle: int, miner: str, base_state_digest: str, artifact_digest: str, salt: bytes
) -> bytes:
    """Return the 32 bytes that a miner commits to. Digests are lower-case hex SHA-256.

    Raises `Invalid` for a salt outside 16 to 64 bytes (a short one can be guessed, and the artifact with it) and for
    digests that are not digests.
    """
    if not MIN_SALT_BYTES <= len(salt) <= MAX_SALT_BYTES:
        raise Invalid(
            f"the salt has {len(salt)} bytes; it needs {MIN_SALT_BYTES} to {MAX_SALT_BYTES} that nobody can guess",
            reason=reasons.REASON_MALFORMED,
        )
    for name, digest in (("base-state", base_state_digest), ("artifact", artifact_digest)):
        if not _DIGEST.fullmatch(digest):
            raise Invalid(
                f"the {name} digest {digest[:80]!r} is not 64 lower-case hex characters",
                reason=reasons.REASON_MALFORMED,
            )
    return hash_fields(TAG, run, cycle, miner, base_state_digest, artifact_digest, salt)


def opens(
    commitment: bytes,
    run: str,
    cycle: int,
    miner: str,
    base_state_digest: str,
    artifact_digest: str,
    salt: bytes,
) -> bool:
    """Return whether these fields are what `commitment` stands for. Raises `Invalid` like `commitment_digest`."""
    digest = commitment_digest(run, cycle, miner, base_state_digest, artifact_digest, salt)
    return hmac.compare_digest(digest, commitment)
