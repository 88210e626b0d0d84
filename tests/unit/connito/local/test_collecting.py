"""What the platform on one machine collects goes from its caches too."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.client import cleaning
from connito.client.cleaning import Cleaning
from connito.local import up
from connito.platform.datadir import DataDir
from connito.runtime.tasks import end_tasks
from connito.store import ref_of_bytes
from connito.store.cache import Cache
from connito.store.named import StoredObject
from connito.v1.artifacts_pb2 import REALM_PUBLIC
from connito.v1.run_pb2 import RetentionPolicy, RunSpec

from tests.support.waiting import until


async def test_copies_of_what_was_collected_leave_both_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, miners = DataDir.open(tmp_path / "data"), tmp_path / "miners"
    old, both, kept = (ref_of_bytes(text, "", REALM_PUBLIC) for text in (b"old", b"both", b"kept"))
    caches = [Cache(data.cache), Cache(miners)]
    for cache in caches:
        cache.folder.mkdir(exist_ok=True)
        for ref, text in ((old, b"old"), (both, b"both"), (kept, b"kept")):
            path = cache.get(ref, lambda target, text=text: target.write_bytes(text))  # type: ignore[misc]
            os.utime(path.with_name(path.name + ".ok"), (0, 0))

    async def collect(*_: object, remove: bool) -> Cleaning:
        assert remove
        stale, left = (
            [StoredObject(f"{one.digest}", one.digest, 1, 0.0, "") for one in refs]
            for refs in ((old, both), (both, kept))
        )
        return Cleaning(stale, left, [], remove)

    monkeypatch.setattr(cleaning, "collect", collect)
    monkeypatch.setattr(up, "COLLECT_SECONDS", 0.01)
    installation = SimpleNamespace(bus=None, store=None, roster=None, miner_cache=miners)
    spec = RunSpec(retention=RetentionPolicy(cycles=1))
    collecting = asyncio.create_task(
        up._Up._collect(cast(Any, SimpleNamespace(data=data)), cast(Any, installation), spec)
    )
    await until(lambda: not any(cache.path(old).exists() for cache in caches))
    await end_tasks([collecting])
    assert all(cache.path(ref).exists() for cache in caches for ref in (both, kept))
