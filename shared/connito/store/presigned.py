"""Query-signed S3 requests (AWS Signature Version 4), and how someone without credentials uses them.

The general client signs no headers into a URL. Here they are the point: with `If-None-Match: *`, the length and the
SHA-256 inside the signature, a URL is good for one object, once (measured against SeaweedFS: 412 on a replay, 400 on
other bytes, 403 on another length or a missing header).
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import functools
import hashlib
import hmac
import http.client
import os
import re
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from urllib.parse import quote, urlsplit

from connito.errors import ObjectDamaged, ObjectMissing, Retry, Unusable, VerificationFailed
from connito.runtime import metrics
from connito.runtime.waiting import DISK, of_disk
from connito.v1 import reasons_pb2 as reasons
from connito.v1.artifacts_pb2 import REALM_PRIVATE, ArtifactRef
from connito.wire import private
from connito.wire.sealing import NoKey

CHUNK = 1 << 20
# What a store says that answers, and has no whole copy of what is asked for.
UNREADABLE = "InternalError"
_CODE, _MESSAGE = re.compile(r"<Code>([^<]*)</Code>"), re.compile(r"<Message>([^<]*)</Message>")
Progress = Callable[[int, int], None]


def presign(
    method: str,
    endpoint: str,
    path: str,
    headers: Mapping[str, str],
    *,
    access_key: str,
    secret_key: str,
    region: str,
    expires_s: int,
    now: datetime.datetime,
    session_token: str = "",
) -> str:
    """Return a URL for one request to `path` that carries exactly `headers` (lower-case names; the host is added).

    `session_token` comes with credentials that end by themselves; the URL is good no longer than they are.
    """
    host = urlsplit(endpoint).netloc
    stamp, day = now.strftime("%Y%m%dT%H%M%SZ"), now.strftime("%Y%m%d")
    scope = f"{day}/{region}/s3/aws4_request"
    signed = {"host": host, **headers}
    names = ";".join(sorted(signed))
    query = "&".join(
        f"{quote(name, safe='')}={quote(value, safe='')}"
        for name, value in sorted(
            {
                "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
                "X-Amz-Credential": f"{access_key}/{scope}",
                "X-Amz-Date": stamp,
                "X-Amz-Expires": str(expires_s),
                "X-Amz-SignedHeaders": names,
                **({"X-Amz-Security-Token": session_token} if session_token else {}),
            }.items()
        )
    )
    canonical_headers = "".join(f"{name}:{signed[name].strip()}\n" for name in sorted(signed))
    canonical = "\n".join([method, quote(path), query, canonical_headers, names, "UNSIGNED-PAYLOAD"])
    to_sign = "\n".join(["AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    signature = hmac.new(_signing_key(secret_key, day, region), to_sign.encode(), hashlib.sha256).hexdigest()
    return f"{endpoint.rstrip('/')}{quote(path)}?{query}&X-Amz-Signature={signature}"


@functools.lru_cache(maxsize=8)
def _signing_key(secret_key: str, day: str, region: str) -> bytes:
    """Return the key of a day, with which each address of that day is signed."""
    key = f"AWS4{secret_key}".encode()
    for part in (day, region, "s3", "aws4_request"):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key


def write_once_headers(ref: ArtifactRef) -> dict[str, str]:
    """Return the headers with which a PUT stores this artifact and no other."""
    return {
        "content-length": str(ref.size),
        "if-none-match": "*",
        "x-amz-checksum-sha256": base64.b64encode(bytes.fromhex(ref.digest)).decode(),
    }


async def put_presigned(url: str, headers: Mapping[str, str], path: Path, *, progress: Progress | None = None) -> bool:
    """Upload a file through a presigned URL. False when the object is there already, which is as good.

    Raises `Retry` when the store is away, `Invalid` when the URL is expired or for another file, `VerificationFailed`
    when the bytes differ from what was declared.
    """
    return await asyncio.to_thread(_put, url, dict(headers), path, progress)


async def get_presigned(
    url: str, ref: ArtifactRef, path: Path, *, key: bytes = b"", progress: Progress | None = None
) -> None:
    """Download through a presigned URL; `path` appears only once digest and size are right. `key` opens a private artifact.

    Raises `Retry` when the store is away, `Invalid` when the URL is expired, `NoKey`, `NotFound`, `VerificationFailed`.
    """
    if ref.realm == REALM_PRIVATE and not key:
        raise NoKey(
            f"{ref.digest[:12]}… is encrypted, and the platform's committer has no key for it: the committer's own was "
            "replaced after it was made, or it was not sealed for it; whoever may read it lends it: `connito access lend`",
            reason=reasons.REASON_NOT_PERMITTED,
        )
    await asyncio.to_thread(_get, url, ref, path, key, progress)


def _connect(url: str) -> tuple[http.client.HTTPConnection, str]:
    parts = urlsplit(url)
    if parts.scheme == "https":
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            parts.netloc, timeout=60, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    return connection, f"{parts.path}?{parts.query}"


def _put(url: str, headers: dict[str, str], path: Path, progress: Progress | None) -> bool:
    connection, target = _connect(url)
    size = path.stat().st_size
    try:
        connection.putrequest("PUT", target, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        sent = _send_body(connection, path, size, progress)
        response = connection.getresponse()
        body = response.read(2000).decode(errors="replace")
    except OSError as error:
        raise Retry(f"the upload to {urlsplit(url).netloc} broke off: {error}", dependency="store") from error
    except http.client.HTTPException as error:
        raise Retry(f"the upload to {urlsplit(url).netloc} broke off: {error!r}", dependency="store") from error
    finally:
        connection.close()
    metrics.STORE_BYTES.labels("up").inc(sent)
    if response.status == 412:
        return False
    _check_status(response.status, body, url)
    return True


def _send_body(connection: http.client.HTTPConnection, path: Path, size: int, progress: Progress | None) -> int:
    sent = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            try:
                connection.send(chunk)
            except (BrokenPipeError, ConnectionResetError):
                break  # refused half-way: the answer says why
            sent += len(chunk)
            if progress is not None:
                progress(sent, size)
    return sent


def _get(url: str, ref: ArtifactRef, path: Path, key: bytes, progress: Progress | None) -> None:
    connection, target = _connect(url)
    partial = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        connection.request("GET", target)
        response = connection.getresponse()
        if response.status != 200:
            _check_status(response.status, response.read(2000).decode(errors="replace"), url, ref.digest)
        read = _whole(response)
        read = private.opened(read, ref, key).read if ref.realm == REALM_PRIVATE else read
        save_verified(read, ref, partial, progress)
        partial.replace(path)
    except http.client.HTTPException as error:
        raise Retry(f"the download from {urlsplit(url).netloc} broke off: {error!r}", dependency="store") from error
    except OSError as error:
        raise disk_or_network(error, path, f"the download from {urlsplit(url).netloc}") from error
    finally:
        connection.close()
        partial.unlink(missing_ok=True)


def _whole(response: http.client.HTTPResponse) -> Callable[[int], bytes]:
    """Return what reads an answer, and raises `Retry` where it ends early: an encrypted object would be taken for damaged."""

    def read(size: int) -> bytes:
        part = response.read(size)
        if not part and response.length:
            raise Retry(f"the download ended {response.length} bytes early", dependency="store")
        return part

    return read


def save_verified(read: Callable[[int], bytes], ref: ArtifactRef, path: Path, progress: Progress | None = None) -> None:
    """Write what `read` delivers to `path`, checking size and digest on the way. Raises `VerificationFailed`."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        while chunk := read(CHUNK):
            size += len(chunk)
            if size > ref.size:
                break
            digest.update(chunk)
            file.write(chunk)
            if progress is not None:
                progress(size, ref.size)
    metrics.STORE_BYTES.labels("down").inc(size)
    # A download that breaks off ends in an error of its own: one that ends is all there is.
    if size != ref.size or digest.hexdigest() != ref.digest:
        raise ObjectDamaged(
            f"what the store returned for {ref.digest} is not it (size or SHA-256 differs); its object is damaged or "
            "was replaced: restore it from a copy"
        )


def save_whole(read: Callable[[int], bytes], path: Path) -> bool:
    """Write an encrypted object as it is; return whether it is as it was written."""
    with path.open("wb") as file:

        def copying(size: int) -> bytes:
            part = read(size)
            file.write(part)
            return part

        return private.whole(copying)


def disk_or_network(error: OSError, path: Path, what: str) -> Exception:
    """Return `Unusable` for a full or read-only disk, which stays so until someone acts, else `Retry`."""
    if error.errno in DISK:
        return of_disk(error, str(path))
    return Retry(f"{what} broke off: {error}", dependency="store")


def unreadable(digest: str, endpoint: str) -> Retry:
    """Return the fault of a store that answers, and cannot read one object."""
    return Retry(
        f"the store at {endpoint} answers, and cannot read {digest}: the object is damaged there, or a part of the store is "
        "away; if this stays, restore it from a copy",
        dependency="object",
    )


def _check_status(status: int, body: str, url: str, wanted: str = "") -> None:
    if status in (200, 201, 204):
        return
    where, told = urlsplit(url).netloc, [found[1] for part in (_CODE, _MESSAGE) if (found := part.search(body))]
    summary = ": ".join(told) if told else " ".join(body.split())[:300]
    if status == 404:
        raise ObjectMissing(f"the store at {where} has no {wanted or 'such object'}; restore it from a copy")
    if wanted and told[:1] == [UNREADABLE]:
        raise unreadable(wanted, where)
    if status in (401, 403):
        raise Unusable(
            f"the store at {where} refuses this URL: it is expired, or for other content; ask for a new one ({summary})",
            dependency="store",
            reason=reasons.REASON_NOT_PERMITTED,
        )
    if status == 400:
        raise VerificationFailed(
            f"the store at {where} found other bytes than were declared ({summary})",
            reason=reasons.REASON_DIGEST_MISMATCH,
        )
    raise Retry(f"the store at {where} answers {status} ({summary})", dependency="store")
