"""Objects that the store has lost, cut, or damaged on its disk: what whoever needs one is told, and what a cache puts back."""

from __future__ import annotations

import io
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from connito.client.waiting import Wait
from connito.errors import ConnitoError, Environment, ObjectDamaged, ObjectMissing
from connito.local.healing import Healer
from connito.platform.servers import ObjectStore
from connito.store import ArtifactStore, get_presigned
from connito.store.cache import Cache
from connito.store.named import key_of
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PUBLIC, ArtifactRef

from tests.support.run import Run

CONTENT = os.urandom(6000)
Harm = Callable[[ArtifactStore, ObjectStore, ArtifactRef], Awaitable[None]]


async def rot(_: ArtifactStore, server: ObjectStore, ref: ArtifactRef) -> None:
    """Flip a bit of the object where the store keeps it."""
    found = 0
    for path in server.data_dir.rglob("*.dat"):
        place = -1
        while (place := path.read_bytes().find(CONTENT[100:160], place + 1)) >= 0:
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([CONTENT[100] ^ 1]))
            found += 1
    assert found


async def lose(store: ArtifactStore, _: ObjectStore, ref: ArtifactRef) -> None:
    """Take it out of the store."""
    await store.remove(key_of(ref), 0.0)


async def cut(store: ArtifactStore, _: ObjectStore, ref: ArtifactRef) -> None:
    """Leave its first half."""
    store._upload(key_of(ref), io.BytesIO(CONTENT[:3000]), 3000, "x/y")


async def swap(store: ArtifactStore, _: ObjectStore, ref: ArtifactRef) -> None:
    """Put something else there."""
    store._upload(key_of(ref), io.BytesIO(bytes(6000)), 6000, "x/y")


@pytest.mark.parametrize(
    ("harm", "kind", "words"),
    [
        (rot, Environment, "answers, and cannot read {}: the object is damaged there, or a part of the store is away"),
        (lose, ObjectMissing, "has no {}; restore it from a copy"),
        (cut, ObjectDamaged, "returned for {} is not it (size or SHA-256 differs)"),
        (swap, ObjectDamaged, "returned for {} is not it (size or SHA-256 differs)"),
    ],
)
async def test_it_is_named_to_everybody_who_reads_it_and_put_back_from_a_cache(
    store: ArtifactStore, object_store: ObjectStore, tmp_path: Path, harm: Harm, kind: type[ConnitoError], words: str
) -> None:
    (file := tmp_path / "file").write_bytes(CONTENT)
    ref = await store.put_file(file, "x/y")
    await harm(store, object_store, ref)

    url = store.presign_get(ref, 60)
    for read in (store.fetch(ref), store.get_bytes(ref), get_presigned(url, ref, tmp_path / "got")):
        with pytest.raises(kind) as caught:
            await read
        told = str(caught.value)
        assert getattr(caught.value, "dependency", "") == "object", told
        assert words.format(ref.digest) in told
        assert "from a copy" in told
        assert "<" not in told, "nobody is shown what the store wrote for machines"

    wait = Wait("miner-1", "r/3/train", "r", "object", told, False)
    full, empty, wrong = (Cache(tmp_path / name) for name in ("full", "empty", "wrong"))
    full.adopt(file, ref)
    wrong.adopt(file, ref).unlink()
    wrong.path(ref).write_bytes(bytes(6000))
    # Of a lost one, the log alone says where it lay.
    story = Run(name="r").say("run", 0, "created", spec={"run": "r", "secret": ref})
    assert await Healer(store, (empty, wrong), story.facts).heal([wait]) == []
    (line,) = await Healer(store, (empty, wrong, full), story.facts).heal([wait])
    assert line == f"put {ref.digest} back, which miner-1 waits for: the store had lost or damaged it"
    assert (await store.fetch(ref)).read_bytes() == CONTENT


async def test_it_is_put_back_everywhere_and_not_at_every_look(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes may lie in two realms, and whoever waits says the digest alone."""
    now = 0.0
    monkeypatch.setattr("connito.local.healing.time.monotonic", lambda: now)
    (file := tmp_path / "file").write_bytes(CONTENT)
    places = [ArtifactRef(realm=REALM_PUBLIC), ArtifactRef(realm=REALM_HOLDOUT)]
    first, second = [await store.put_file(file, "x/y", place) for place in places]
    await store.remove(key_of(second), 0.0)
    (cache := Cache(tmp_path / "full")).adopt(file, first)
    story = Run(name="r").say(
        "run", 0, "created", spec={"run": "r", "secret": first, "tasks": [{"domain": "d", "artifact": second}]}
    )
    healer, wait = Healer(store, (cache,), story.facts), Wait("a", "b", "r", "object", f"has no {second.digest}", False)
    assert len(await healer.heal([wait])) == 1
    assert await store.stat(second) == len(CONTENT)
    await store.remove(key_of(second), 0.0)
    assert await healer.heal([wait]) == [], "a large one is not hashed and sent every two seconds"
    now += 31
    assert len(await healer.heal([wait])) == 1
    assert await store.stat(second) == len(CONTENT)
