"""A file of the cache is verified whenever it is handed out, whatever its size and time say."""

from __future__ import annotations

import fcntl
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from connito.errors import Invalid
from connito.store import ref_of_bytes
from connito.store.cache import Cache
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef

from tests.support.waiting import wait_until

DATA = bytes(range(256)) * 40
REF = ref_of_bytes(DATA, "text/plain", REALM_PUBLIC)


class Source:
    """Counts how often the artifact was fetched."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, target: Path) -> None:
        self.times += 1
        target.write_bytes(DATA)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path)


@pytest.fixture
def source() -> Source:
    return Source()


def test_what_is_right_is_not_fetched_again(cache: Cache, source: Source) -> None:
    path = cache.get(REF, source)
    assert cache.get(REF, source) == path
    assert source.times == 1


@pytest.mark.parametrize("position", [0, 1, len(DATA) // 2, len(DATA) - 1])
def test_a_flipped_bit_with_the_same_size_and_time_is_noticed(cache: Cache, source: Source, position: int) -> None:
    path = cache.get(REF, source)
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(position)
        file.write(bytes([DATA[position] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(before.st_mode)
    assert cache.get(REF, source).read_bytes() == DATA
    assert source.times == 2


@pytest.mark.parametrize("length", [0, 1, len(DATA) // 2, len(DATA) - 1])
def test_a_file_torn_by_a_power_cut_is_fetched_again(cache: Cache, source: Source, length: int) -> None:
    os.truncate(cache.get(REF, source), length)
    assert cache.get(REF, source).read_bytes() == DATA


def test_who_reads_a_damaged_file_keeps_it_while_another_takes_its_place(cache: Cache, source: Source) -> None:
    path = cache.get(REF, source)
    with path.open("rb") as reading:
        os.truncate(path, 5)
        assert cache.get(REF, source).read_bytes() == DATA
        assert reading.read() == DATA[:5]


def test_drafts_of_killed_processes_are_removed(cache: Cache, source: Source) -> None:
    path = cache.path(REF)
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.part1234567").write_bytes(DATA[:100])
    cache.get(REF, source)
    assert sorted(left.suffix for left in path.parent.iterdir()) == ["", ".ok"]


def test_many_at_once_fetch_once_and_leave_no_lock(cache: Cache) -> None:
    """Who waits for a lock may find that it was removed meanwhile, and another one stands in its place."""
    inside, most, fetched = 0, 0, 0

    def download(target: Path) -> None:
        nonlocal inside, most, fetched
        inside += 1
        most, fetched = max(most, inside), fetched + 1
        time.sleep(0.03)
        if fetched < 4:
            inside -= 1
            raise Invalid("not yet")
        target.write_bytes(DATA)
        inside -= 1

    def ask(_: int) -> bool:
        try:
            return cache.get(REF, download).read_bytes() == DATA
        except Invalid:
            return False

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(8)))
    assert (answers.count(True), most, fetched) == (5, 1, 4)
    assert sorted(left.suffix for left in cache.path(REF).parent.iterdir()) == ["", ".ok"]


def test_a_lock_that_was_removed_before_it_was_taken_is_none(
    cache: Cache, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever held it is done just after this one has opened its file, and a third one holds another of that name."""
    flock, third, asked = fcntl.flock, list[int](), 0
    path = cache.path(REF)
    lock = path.with_name(f"{path.name}.lock")

    def late(descriptor: int, how: int) -> None:
        nonlocal asked
        asked += 1
        if not third:
            lock.unlink()
            third.append(os.open(lock, os.O_RDWR | os.O_CREAT))
            flock(third[0], fcntl.LOCK_EX)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(cache.get, REF, source)
        # It has seen that its own lock is of a file that is gone, and asks for the other one's.
        wait_until(lambda: asked > 1 or source.times)
        assert source.times == 0, "it waits for the third one"
        lock.unlink()
        os.close(third[0])
        assert found.result().read_bytes() == DATA


def test_a_lock_is_removed_while_it_is_still_held(
    cache: Cache, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it somebody else may hold it: who removes that one lets a third one in beside him."""
    close, links = os.close, list[int]()

    def closed(descriptor: int) -> None:
        if ".lock" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            links.append(os.fstat(descriptor).st_nlink)
        close(descriptor)

    monkeypatch.setattr(os, "close", closed)
    cache.get(REF, source)
    assert links == [0]


def test_what_cannot_be_fetched_leaves_nothing(cache: Cache) -> None:
    def broken(target: Path) -> None:
        target.write_bytes(DATA[:7])
        raise Invalid("not today")

    with pytest.raises(Invalid, match="not today"):
        cache.get(REF, broken)
    assert not cache.path(ArtifactRef(digest=REF.digest)).exists()
