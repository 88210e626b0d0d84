from __future__ import annotations

import asyncio
import datetime
import hashlib
import io
import os
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from connito.errors import Retry
from connito.store import get_presigned
from connito.store.presigned import presign, write_once_headers
from connito.v1.artifacts_pb2 import REALM_PRIVATE, REALM_PUBLIC, ArtifactRef, Realm
from connito.wire.private import closed

NOW = datetime.datetime(2013, 5, 24, tzinfo=datetime.UTC)


def test_the_example_of_the_specification() -> None:
    """Amazon S3 API reference, "Authenticating requests: using query parameters", example."""
    url = presign(
        "GET",
        "https://examplebucket.s3.amazonaws.com",
        "/test.txt",
        {},
        access_key="AKIAIOSFODNN7EXAMPLE",
        secret_key="wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        region="us-east-1",
        expires_s=86400,
        now=NOW,
    )
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-Signature"] == ["aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404"]


def test_conditions_are_part_of_the_signature() -> None:
    ref = ArtifactRef(digest="ab" * 32, size=7)
    headers = write_once_headers(ref)
    options: dict[str, Any] = {"access_key": "a", "secret_key": "s", "region": "r", "expires_s": 60, "now": NOW}
    url = presign("PUT", "http://127.0.0.1:8333", "/b/k", headers, **options)
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-SignedHeaders"] == ["content-length;host;if-none-match;x-amz-checksum-sha256"]
    assert presign("PUT", "http://127.0.0.1:8333", "/b/k", headers | {"content-length": "8"}, **options) != url
    assert presign("GET", "http://127.0.0.1:8333", "/b/k", headers, **options) != url
    assert presign("PUT", "http://127.0.0.1:8334", "/b/k", headers, **options) != url


@pytest.mark.parametrize("realm", [REALM_PUBLIC, REALM_PRIVATE])
async def test_a_download_that_breaks_off_is_tried_again_and_nothing_is_damaged(
    tmp_path: Path, realm: Realm.ValueType
) -> None:
    """An encrypted object that ends early looks like one that was cut off in the store."""
    data, secret, key = os.urandom(3 << 20), "5" * 64, bytes(32)
    ref = ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=len(data), realm=realm, secret=secret)
    sent = data if realm == REALM_PUBLIC else closed(io.BytesIO(data), secret, key).read()

    ends = [0]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(sent) + sent[: ends[0]])
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1") as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x?"
        for length in (100, 2 << 20, len(sent) - 1):
            ends[:] = [length]
            with pytest.raises(Retry):
                await get_presigned(url, ref, tmp_path / "got", key=key)
        ends[:] = [len(sent)]
        await get_presigned(url, ref, tmp_path / "got", key=key)
    assert [path.read_bytes() == data for path in tmp_path.iterdir()] == [True]
