"""Meanings of what the store's client raises."""

from __future__ import annotations

from pathlib import Path

import urllib3
from minio.error import InvalidResponseError, S3Error, ServerError

from connito.errors import ConnitoError, ObjectMissing, Retry, Unusable
from connito.store.presigned import UNREADABLE, disk_or_network, unreadable
from connito.v1 import reasons_pb2 as reasons
from connito.wire.tls import refusal

_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "AuthorizationHeaderMalformed",
}
READING = {"fetch", "get", "range", "copy"}
MISSING = {"NoSuchKey", "NoSuchObject", "ResourceNotFound"}


def explained(error: Exception, operation: str, what: str, endpoint: str, bucket: str) -> Exception:
    """Return what an error of the store's client means."""
    away = f"the store at {endpoint} is away ({operation} {what})"
    if isinstance(error, ConnitoError):
        return error
    if isinstance(error, S3Error):
        if error.code in MISSING:
            return ObjectMissing(f"the store has no {what}; restore it from a copy")
        if error.code == "NoSuchBucket":
            text = f"the store has no bucket {bucket} yet; create it or check CONNITO_S3_BUCKET"
            return Retry(text, dependency="store")
        if error.code == "RequestTimeTooSkewed":
            # Requests are signed by the time that its answers tell: who answers and who checks are not of one mind.
            text = f"the store at {endpoint} refuses the time of {operation} on {bucket}, which is the one that its answers tell"
            return Unusable(
                f"{text}; set the clocks of the store and of the proxy in front of it", dependency="store",
                reason=reasons.REASON_STORE_UNAVAILABLE,
            )  # fmt: skip
        if error.code in _DENIED:
            return Unusable(
                f"the store at {endpoint} denies {operation} on {bucket} ({error.code}); "
                "check CONNITO_S3_ACCESS_KEY, CONNITO_S3_SECRET_KEY, the key's policy, and that the clocks "
                "of the store and of a proxy in front of it agree",
                dependency="credentials",
                reason=reasons.REASON_NOT_PERMITTED,
            )
        if error.code == UNREADABLE and operation in READING:
            return unreadable(what, endpoint)
        return Retry(f"{away}: {error.code} {error.message}", dependency="store")
    if isinstance(error, (urllib3.exceptions.HTTPError, ServerError, InvalidResponseError)):
        if (why := refusal(str(error), f"the store at {endpoint}", "SSL_CERT_FILE")) is not None:
            return Retry(str(why), dependency="store")  # It may be renewed, here or there.
        # What a proxy answers in place of the store is a page.
        return Retry(f"{away}: {str(error).partition(', Body:')[0]}", dependency="store")
    if isinstance(error, OSError):
        return disk_or_network(error, Path(error.filename or what), away)
    return error
