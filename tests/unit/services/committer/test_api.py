"""What the committer's API answers, beside what it judges."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from connito.errors import NotFound, ObjectMissing, VerificationFailed
from connito.runtime.limits import RateLimit
from connito.store import get_presigned
from connito.v1 import services_pb2
from connito.v1.artifacts_pb2 import REALM_PRIVATE, REALM_PUBLIC, ArtifactRef
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.sealing import NoKey
from connito.wire.subjects import LIBRARY

from services.committer.api import SubmissionApi

ME = Identity.generate()
OPEN = ArtifactRef(digest="0" * 64, size=1, realm=REALM_PUBLIC)
MINE, *SHUT = (ArtifactRef(digest=d * 64, size=1, realm=REALM_PRIVATE, secret=d * 64) for d in "1234")
OTHERS, *_ = SHUT
# Sealed for others, gone, and sealed with a box that does not open, by whoever meant it.
WHY = dict(
    zip(
        (ref.digest for ref in SHUT),
        (NoKey("others'"), ObjectMissing("gone"), VerificationFailed("broken")),
        strict=True,
    )
)
REFS = {ref.digest: ref for ref in (OPEN, MINE, *SHUT)}


class Store:
    async def stat(self, ref: ArtifactRef) -> int:
        return ref.size

    def presign_get(self, ref: ArtifactRef, seconds: int) -> str:
        return f"http://store/{ref.digest}"

    async def boxed_key(self, ref: ArtifactRef, reader: str) -> bytes:
        if ref.digest in WHY:
            raise WHY[ref.digest]
        return b"a box"


async def ask(*refs: ArtifactRef) -> services_pb2.RequestDownloadsResponse:
    async def entitled(facts: object, key: str) -> dict[str, ArtifactRef]:
        return REFS

    host: Any = SimpleNamespace(host=SimpleNamespace(now_ms=lambda: int(time.time() * 1000)))
    state: Any = SimpleNamespace(runs={}, roster=None, refresh=entitled)
    store: Any = Store()
    api = SubmissionApi(host, state, store, RateLimit(9, 9, time.monotonic), 60)
    api._downloads.entitled = entitled  # type: ignore[method-assign]
    command = services_pb2.DownloadsCommand(run=LIBRARY, digests=[ref.digest for ref in refs])
    request = services_pb2.RequestDownloadsRequest(envelope=seal(ME, "rpc.RequestDownloads", command))
    return await api.RequestDownloads(request, None)


async def test_what_the_committer_cannot_open_costs_nothing_that_is_asked_for_beside_it(tmp_path: Path) -> None:
    answer = await ask(OPEN, *SHUT, MINE)
    assert set(answer.urls) == set(REFS)
    assert dict(answer.keys) == {MINE.digest: b"a box"}
    with pytest.raises(NoKey, match="access lend"):
        await get_presigned(answer.urls[OTHERS.digest], OTHERS, tmp_path / "f", key=answer.keys[OTHERS.digest])


async def test_what_the_run_gives_nobody_is_refused_by_name() -> None:
    with pytest.raises(NotFound, match="9999"):
        await ask(OPEN, ArtifactRef(digest="9" * 64))
