"""Measure what it costs that acknowledged objects are on disk, and that the cache hashes whatever it hands out."""

from __future__ import annotations

import io
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from connito.platform.servers import ObjectStore
from connito.store import ref_of_bytes
from connito.store.cache import Cache
from connito.v1.artifacts_pb2 import REALM_PUBLIC
from minio import Minio

from bench.harness import Options, Result, main

SIZES = (10_000, 1_000_000, 16_000_000)
TIMES = 9


class Unsynced(ObjectStore):
    """The store as it comes: names in a database that does not sync, and no rules."""

    def _prepare(self) -> list[str]:
        command = super()._prepare()
        (self.data_dir / "filer.toml").write_text('[leveldb2]\nenabled = true\ndir = "objects/filerldb2"\n')
        return command

    def _not_ready(self) -> str:
        return self._probe()


def median_ms(work: Callable[[], object]) -> float:
    """Return the median of several times."""
    taken = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - began))
    return round(statistics.median(taken), 3)


def put_ms(server: ObjectStore) -> dict[int, float]:
    """Return how long an object of each size takes until it is acknowledged."""
    client = Minio(server.url.removeprefix("http://"), server.access_key, server.secret_key, secure=False)
    client.make_bucket("bench")

    def put(size: int) -> None:
        client.put_object("bench", secrets.token_hex(16), io.BytesIO(bodies[size]), size)

    bodies = {size: os.urandom(size) for size in SIZES}
    return {size: median_ms(partial(put, size)) for size in SIZES}


def hit_ms(folder: Path) -> dict[int, float]:
    """Return how long the cache takes to hand out a file of each size that it holds."""
    cache, found = Cache(folder), {}
    for size in SIZES:
        body = os.urandom(size)
        ref = ref_of_bytes(body, "application/octet-stream", REALM_PUBLIC)
        fill = partial(_write, body)
        cache.get(ref, fill)
        found[size] = median_ms(partial(cache.get, ref, fill))
    return found


def _write(body: bytes, target: Path) -> None:
    target.write_bytes(body)


def run(options: Options) -> Result:
    """Measure each once; medians in milliseconds by size."""
    with tempfile.TemporaryDirectory(prefix="connito-bench-") as folder:
        figures = {}
        for name, kind in (("put_as_it_comes", Unsynced), ("put_synced", ObjectStore)):
            with kind(Path(folder) / name) as server:
                figures[name] = put_ms(server)
        figures["cache_hit_hashed"] = hit_ms(Path(folder) / "cache")
    rows = [
        {"what": name, "bytes": size, "ms": ms} for name, by_size in figures.items() for size, ms in by_size.items()
    ]
    return Result({"times": TIMES}, rows, {f"{row['what']}_{row['bytes']}_bytes_ms": row["ms"] for row in rows})


if __name__ == "__main__":
    main("durability", run, doc=__doc__ or "")
