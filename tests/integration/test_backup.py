"""Backups of a broker and a store while somebody writes, and both made again from them."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from connito.bus import Bus, CaughtUp, snapshots, streams
from connito.bus.position import PositionedLog
from connito.bus.streams import FACT_STREAMS
from connito.client import backups
from connito.errors import ConnitoError, Invalid, NotFound, VerificationFailed
from connito.platform.datadir import DataDir
from connito.platform.servers import NatsServer, ObjectStore
from connito.runtime.tasks import end_tasks
from connito.store import ArtifactStore
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.fact import Record
from connito.wire.roster import Roster
from connito.wire.subjects import ROOT

from tests.integration.conftest import declare_streams

pytestmark = pytest.mark.integration


class Writer:
    """Says one thing after the other, each because of the one before, all in different streams, and stores what it names."""

    def __init__(self, bus: Bus, store: ArtifactStore) -> None:
        self.bus, self.store, self.said = bus, store, 0

    async def say(self) -> None:
        self.said += 1
        ref = await self.store.put_bytes(f"work {self.said}".encode(), "text/plain")
        stream = FACT_STREAMS[self.said % len(FACT_STREAMS)]
        section = "run" if stream == "RUNS" else stream.lower()
        body = f"{self.said} {ref.digest}".encode()
        await self.bus.js.publish(f"{ROOT}.r{self.said}.{section}.1.said", body)

    async def forever(self) -> None:
        while True:
            await self.say()
            await asyncio.sleep(0.015)


async def stored(bus: Bus) -> dict[int, Record]:
    """What is in the streams, by its number."""
    return {int(record.data.split()[0]): record async for record in bus.stored(FACT_STREAMS)}


@asynccontextmanager
async def a_broker(folder: Path) -> AsyncIterator[Bus]:
    with NatsServer(folder) as server:
        async with await Bus.connect(server.url, None, "backup") as bus:
            yield bus


def another(store: ArtifactStore, server: ObjectStore, folder: Path) -> ArtifactStore:
    """A bucket that does not exist yet."""
    return ArtifactStore(
        server.url, server.access_key, server.secret_key, f"{store.bucket}-2", "us-east-1", folder / "cache-2"
    )


@pytest.fixture
async def source(own_nats: NatsServer) -> AsyncIterator[Bus]:
    async with await Bus.connect(own_nats.url, None, "source") as bus:
        yield bus


async def test_what_is_restored_is_one_moment_of_a_platform_that_went_on(
    source: Bus, store: ArtifactStore, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, copy = Writer(source, store), snapshots.save

    async def copy_while_others_write(*arguments: Any) -> Any:
        copied = await copy(*arguments)
        for _ in range(3):
            await writer.say()
        return copied

    monkeypatch.setattr(snapshots, "save", copy_while_others_write)
    for _ in range(20):
        await writer.say()
    writing = asyncio.create_task(writer.forever())
    await backups.save(source, store, tmp_path / "backup")
    await end_tasks([writing])
    before = await stored(source)

    elsewhere = another(store, object_store, tmp_path)
    async with a_broker(tmp_path / "new") as bus:
        await backups.load(bus, elsewhere, tmp_path / "backup")
        after = await stored(bus)
        # Each is there with all that it followed from, at its place and its time, with what it names.
        assert 20 <= len(after) < len(before)
        assert sorted(after) == list(range(1, len(after) + 1))
        assert after == {number: before[number] for number in after}
        for record in after.values():
            digest = record.data.split()[1].decode()
            ref = ArtifactRef(digest=digest, size=1, realm=REALM_PUBLIC)
            assert await elsewhere.stat(ref) is not None
        # What comes later comes behind what anybody may have seen before, and nobody can delete any of it.
        info = await bus.js.stream_info("TRAIN")
        assert info.config.deny_delete
        assert {row["name"]: row["exists"] for row in await streams.describe(bus.js)} == dict.fromkeys(
            streams.STREAMS, True
        )
        await Writer(bus, elsewhere).say()


async def test_a_second_backup_reads_new_objects_alone_and_is_whole_when_the_first_is_gone(
    source: Bus, store: ArtifactStore, object_store: ObjectStore, tmp_path: Path
) -> None:
    writer = Writer(source, store)
    await writer.say()
    first = await backups.save(source, store, tmp_path / "backup")
    await writer.say()
    (kept,) = first.objects
    written = (tmp_path / "backup/objects" / kept).stat().st_mtime_ns
    second = await backups.save(source, store, tmp_path / "backup")
    assert len(second.objects) == 2
    assert (tmp_path / "backup/objects" / kept).stat().st_mtime_ns == written
    assert len(list((tmp_path / "backup").glob("streams-*"))) == 1
    async with a_broker(tmp_path / "new") as bus:
        await backups.load(bus, another(store, object_store, tmp_path), tmp_path / "backup")
        assert len(await stored(bus)) == 2


async def test_the_shelf_and_what_goes_on_are_kept_as_well(
    source: Bus, store: ArtifactStore, object_store: ObjectStore, tmp_path: Path
) -> None:
    data = DataDir.open(tmp_path / "data")
    kept = {
        "begun.json": "{}",
        "threads": "2",
        "shelf/journal.jsonl": "{}\n",
        "shelf/experts/one/sub/record.json": "{}",
    }
    others = {
        "shelf/experts/.two.partial/record.json": "half",
        "shelf/index.sqlite": "made again",
        "keys/a.nk": "secret",
    }
    for name, text in {**kept, **others}.items():
        (data.root / name).parent.mkdir(parents=True, exist_ok=True)
        (data.root / name).write_text(text)
    await Writer(source, store).say()
    saved = await backups.save(source, store, tmp_path / "backup", data=data)
    assert set(saved.files) == set(kept)

    new = DataDir.open(tmp_path / "new-data")
    (new.root / "threads").write_text("8")
    async with a_broker(tmp_path / "new") as bus:
        await backups.load(bus, another(store, object_store, tmp_path), tmp_path / "backup", data=new)
    back = {path.relative_to(new.root).as_posix(): path.read_text() for path in new.root.rglob("*") if path.is_file()}
    assert back == {**kept, "threads": "8"}


async def test_services_do_not_wait_for_what_a_backup_does_not_have(
    source: Bus, store: ArtifactStore, tmp_path: Path, roster: Roster
) -> None:
    writer = Writer(source, store)
    for _ in range(2 * len(FACT_STREAMS)):
        await writer.say()
    done = await backups.save(source, store, tmp_path / "backup")
    # As if the cut had been one message earlier in each stream.
    document = json.loads((tmp_path / "backup/backup.json").read_text())
    for saved in document["streams"].values():
        saved["last_sequence"] = max(0, saved["last_sequence"] - 1)
    (tmp_path / "backup/backup.json").write_text(json.dumps(document))
    async with a_broker(tmp_path / "new") as bus:
        await backups.load(bus, store, tmp_path / "backup")
        assert await bus.last_sequence("TRAIN") == done.streams["TRAIN"].last_sequence, (
            "sequences are not given out again"
        )
        log = PositionedLog(roster)

        async def follow() -> None:
            async for item in bus.follow(("TRAIN",)):
                if not isinstance(item, CaughtUp):
                    with suppress(Invalid):
                        log.apply(item)

        following = asyncio.create_task(follow())
        await log.refresh(bus, ("TRAIN",))
        assert log.position("TRAIN") == done.streams["TRAIN"].last_sequence
        await Writer(bus, store).say()
        await end_tasks([following])


def lose_a_stream(folder: Path) -> None:
    next(folder.glob("streams-*/RUNS.snapshot")).unlink()


def lose_an_object(folder: Path) -> None:
    next(path for path in (folder / "objects").rglob("*") if path.is_file()).unlink()


def change_a_stream(folder: Path) -> None:
    path = next(folder.glob("streams-*/RUNS.snapshot"))
    path.write_bytes(path.read_bytes()[:-1])


def change_an_object(folder: Path) -> None:
    path = next(path for path in (folder / "objects").rglob("*") if path.is_file())
    path.write_bytes(b"x" * path.stat().st_size)


def break_off(folder: Path) -> None:
    (folder / "backup.json").unlink()


def write_nonsense(folder: Path) -> None:
    (folder / "backup.json").write_text('{"format": 1}')


def come_from_the_future(folder: Path) -> None:
    path = folder / "backup.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))


FAULTS = {
    lose_a_stream: (VerificationFailed, "lacks"),
    lose_an_object: (VerificationFailed, "lacks"),
    change_a_stream: (VerificationFailed, "damaged"),
    change_an_object: (VerificationFailed, "damaged"),
    break_off: (NotFound, "holds no backup"),
    write_nonsense: (VerificationFailed, "damaged or of another version"),
    come_from_the_future: (Invalid, "format 2"),
}


async def test_a_backup_that_is_not_whole_changes_nothing_in_the_broker(
    source: Bus, store: ArtifactStore, tmp_path: Path, nats_server: NatsServer
) -> None:
    await Writer(source, store).say()
    await backups.save(source, store, tmp_path / "whole")
    async with a_broker(tmp_path / "new") as bus:
        for fault, (kind, words) in FAULTS.items():
            folder = tmp_path / fault.__name__
            shutil.copytree(tmp_path / "whole", folder)
            fault(folder)
            with pytest.raises(kind, match=words):
                await backups.load(bus, store, folder)
            assert not any(row["exists"] for row in await streams.describe(bus.js))


async def test_a_backup_does_not_go_over_what_is_there(source: Bus, store: ArtifactStore, tmp_path: Path) -> None:
    await Writer(source, store).say()
    await backups.save(source, store, tmp_path / "backup")
    with pytest.raises(Invalid, match="goes into an empty broker"):
        await backups.load(source, store, tmp_path / "backup")
    assert len(await stored(source)) == 1
    # Streams that were declared, as an installation does by itself, and hold nothing are none.
    with NatsServer(tmp_path / "declared") as server:
        await declare_streams(server.url)
        async with await Bus.connect(server.url, None, "declared") as bus:
            await backups.load(bus, store, tmp_path / "backup")
            assert len(await stored(bus)) == 1


async def test_where_it_cannot_be_written_is_said(source: Bus, store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnitoError, match="cannot write a backup into"):
        await backups.save(source, store, tmp_path / "file")
