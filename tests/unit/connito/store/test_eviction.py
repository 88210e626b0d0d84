"""What leaves the cache when room is needed: hand-ins first, then what was asked for longest ago, and nothing in use."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest
from connito.store.cache import Cache
from connito.store.eviction import IN_USE_SECONDS, drop, make_room
from connito.v1.artifacts_pb2 import REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef

SIZE = 1000


def put(cache: Cache, number: int, hours_ago: float, realm: int = REALM_PUBLIC) -> ArtifactRef:
    """Fetch the artifact of that number, which was last asked for so long ago."""
    data = str(number).encode().ljust(SIZE, b".")
    ref = ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=SIZE, realm=realm)  # type: ignore[arg-type]

    def download(target: Path) -> None:
        target.write_bytes(data)

    path = cache.get(ref, download)
    stamp = path.with_name(path.name + ".ok")
    then = stamp.stat().st_mtime - 3600 * hours_ago
    os.utime(stamp, (then, then))
    return ref


def kept(cache: Cache, refs: list[ArtifactRef]) -> list[int]:
    return [number for number, ref in enumerate(refs) if cache.path(ref).exists()]


def test_the_longest_unused_goes_and_its_companions_with_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 4 * SIZE)
    refs = [put(cache, number, 5 - number) for number in range(4)]
    refs.append(put(cache, 4, 0))
    assert kept(cache, refs) == [1, 2, 3, 4]
    left = {path.name for path in tmp_path.rglob(f"{refs[0].digest}*")}
    assert not left


def test_what_the_store_collected_is_dropped_with_its_companions(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    refs = [put(cache, number, 1, REALM_SUBMISSION) for number in range(3)]
    cache.path(refs[0]).with_name(f"{refs[0].digest}.x.open").touch()
    assert drop(tmp_path, [refs[0].digest, "f" * 64]) == set()
    assert kept(cache, refs) == [1, 2]
    assert not list(tmp_path.rglob(f"{refs[0].digest}*"))


def test_what_was_asked_for_just_now_is_dropped_later(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    refs = [put(cache, 0, 0), put(cache, 1, 1)]
    digests = [ref.digest for ref in refs]
    assert drop(tmp_path, digests) == {digests[0]}
    assert kept(cache, refs) == [0]
    assert drop(tmp_path, digests, now=lambda: time.time() + IN_USE_SECONDS + 1) == set()
    assert kept(cache, refs) == []


def test_hand_ins_go_before_everything_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    refs = [put(cache, 0, 9), put(cache, 1, 2, REALM_SUBMISSION), put(cache, 2, 1, REALM_SUBMISSION)]
    refs.append(put(cache, 3, 0))
    assert kept(cache, refs) == [0, 2, 3]


def test_asking_for_a_file_keeps_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 3 * SIZE)
    refs = [put(cache, number, 5 - number) for number in range(3)]
    cache.get(refs[0], lambda _: pytest.fail("fetched again"))
    refs.append(put(cache, 3, 0))
    assert kept(cache, refs) == [0, 2, 3]


def test_what_somebody_may_be_about_to_open_stays_though_the_limit_is_passed(tmp_path: Path) -> None:
    cache = Cache(tmp_path, SIZE)
    refs = [put(cache, number, 0.9 * IN_USE_SECONDS / 3600) for number in range(3)]
    assert kept(cache, refs) == [0, 1, 2]


def test_without_a_limit_some_of_the_disk_stays_free(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    refs = [put(cache, number, 5 - number) for number in range(3)]
    assert make_room(tmp_path, SIZE, 0, free=lambda _: 1 << 50) == 0
    assert kept(cache, refs) == [0, 1, 2]
    assert make_room(tmp_path, SIZE, 0, free=lambda _: 0) == 3 * SIZE
    assert kept(cache, refs) == []


def test_what_was_evicted_is_fetched_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 2 * SIZE)
    first = put(cache, 0, 5)
    put(cache, 1, 1), put(cache, 2, 0)
    assert not cache.path(first).exists()
    assert put(cache, 0, 0) == first
    assert cache.path(first).read_bytes().startswith(b"0")
