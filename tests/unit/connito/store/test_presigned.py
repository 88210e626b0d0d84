from __future__ import annotations

import datetime
from typing import Any
from urllib.parse import parse_qs, urlsplit

from connito.store.presigned import presign, write_once_headers
from connito.v1.artifacts_pb2 import ArtifactRef

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
