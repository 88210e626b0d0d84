"""Randomness that no single validator, and no miner, can foresee or choose.

Every validator publishes the hash of a secret while miners train and the secret itself once nothing can be submitted
any more. The seed of the cycle is a hash over all revealed secrets. What is left to the last one to reveal is to stay
silent, which costs it the cycle's reward.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons
from connito.wire.hashing import hash_fields

SECRET_TAG = b"connito.v1.beacon.secret"
SEED_TAG = b"connito.v1.beacon.seed"
MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 64


def secret_digest(run: str, cycle: int, validator: str, secret: bytes) -> bytes:
    """Return the 32 bytes a validator commits to during training. Raises `Invalid` for a secret outside 16 to 64
    bytes.
    """
    if not MIN_SECRET_BYTES <= len(secret) <= MAX_SECRET_BYTES:
        raise Invalid(
            f"a beacon secret has {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes, this one {len(secret)}",
            reason=reasons.REASON_MALFORMED,
        )
    return hash_fields(SECRET_TAG, run, cycle, validator, secret)


def opens(digest: bytes, run: str, cycle: int, validator: str, secret: bytes) -> bool:
    """Return whether `secret` is what the validator committed to. A malformed secret opens nothing."""
    try:
        return hmac.compare_digest(secret_digest(run, cycle, validator, secret), digest)
    except Invalid:
        return False


def draw_seed(run: str, cycle: int, secrets: Mapping[str, bytes]) -> bytes:
    """Return the 32-byte seed of a cycle: a hash over the validators' secrets, sorted by validator.

    Raises `Invalid` (REASON_NO_QUORUM) when nobody revealed.
    """
    if not secrets:
        raise Invalid("no validator revealed its secret, so there is no seed", reason=reasons.REASON_NO_QUORUM)
    fields = [part for validator, secret in sorted(secrets.items()) for part in (validator, secret)]
    return hash_fields(SEED_TAG, run, cycle, *fields)
