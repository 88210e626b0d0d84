"""Encrypted artifacts against a real SeaweedFS: who opens them, and what lies there for everybody else."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from connito.client import backups
from connito.errors import Invalid, ObjectDamaged
from connito.store import ArtifactStore, get_presigned, key_of, put_presigned
from connito.store.keyring import Keyring
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PRIVATE, REALM_PUBLIC, REALM_SUBMISSION, ArtifactRef
from connito.wire import private
from connito.wire.identity import Identity
from connito.wire.sealing import MEDIA_TYPE, NoKey, lend, seal_file

pytestmark = pytest.mark.integration

OWNER, SERVICE, LATE, STRANGER = (Identity.generate() for _ in range(4))
STATE = os.urandom(3 << 20)


def of(store: ArtifactStore, me: Identity | None, folder: Path, lent: Path | None = None) -> ArtifactStore:
    given = store._credentials.retrieve()
    assert given.access_key is not None
    assert given.secret_key is not None
    return ArtifactStore(
        store.endpoint, given.access_key, given.secret_key, store.bucket, store.region, folder, keys=Keyring(me, lent)
    )


@pytest.fixture
async def place(store: ArtifactStore, tmp_path: Path) -> ArtifactRef:
    (plain := tmp_path / "plain").write_bytes(private.secret_of(OWNER, "run"))
    seal_file(plain, tmp_path / "secret", OWNER, [SERVICE.public])
    return private.at((await store.put_file(tmp_path / "secret", MEDIA_TYPE)).digest)


async def test_those_that_it_was_sealed_for_read_and_the_store_holds_noise(
    store: ArtifactStore, place: ArtifactRef, tmp_path: Path
) -> None:
    service = of(store, SERVICE, tmp_path / "service")
    ref = await service.put_bytes(STATE, "application/x", place)
    assert (ref.digest, ref.size, ref.realm) == (hashlib.sha256(STATE).hexdigest(), len(STATE), REALM_PRIVATE)
    assert await service.stat(ref) == len(STATE)
    for reader in (service, of(store, OWNER, tmp_path / "owner")):
        assert await reader.get_bytes(ref) == (await reader.fetch(ref)).read_bytes() == STATE
    for name, me in (("none", None), ("stranger", STRANGER)):
        with pytest.raises(NoKey):
            await of(store, me, tmp_path / name).fetch(ref)
    found = {one.key: one for one in await store.objects()}
    raw = store._read(key_of(ref), 0, 0, 1 << 30)
    assert raw.startswith(b"connito.v1.private\n")
    assert not any(STATE[at : at + 32] in raw for at in range(0, len(STATE), 4096))
    assert found[key_of(ref)].digest == ref.digest
    with pytest.raises(Invalid):
        await service.read_range(ref, 0, 10)


async def test_who_came_later_reads_what_was_lent(store: ArtifactStore, place: ArtifactRef, tmp_path: Path) -> None:
    ref = await of(store, SERVICE, tmp_path / "service").put_bytes(STATE, "application/x", place)
    lent = tmp_path / "lent.json"
    late = of(store, LATE, tmp_path / "late", lent)
    with pytest.raises(NoKey):
        await late.fetch(ref)
    lent.write_text(f'{{"{place.secret}": "{lend(tmp_path / "secret", SERVICE, LATE.public)}"}}')
    assert (await late.fetch(ref)).read_bytes() == STATE


async def test_an_owner_uploads_and_a_reader_downloads_by_addresses_alone(
    store: ArtifactStore, place: ArtifactRef, tmp_path: Path
) -> None:
    committer = of(store, SERVICE, tmp_path / "committer")
    ref = ArtifactRef(
        digest=hashlib.sha256(STATE).hexdigest(), size=len(STATE), realm=REALM_PRIVATE, secret=place.secret
    )
    key = private.key_of_content(private.secret_of(OWNER, "run"), ref.digest)
    (tmp_path / "content").write_bytes(STATE)
    with (tmp_path / "content").open("rb") as file:
        (sent := tmp_path / "sent").write_bytes(private.closed(file, place.secret, key).read())
    url, headers = committer.presign_put(ref, 60, hashlib.sha256(sent.read_bytes()).hexdigest())
    assert await put_presigned(url, headers, sent)
    told = private.unboxed(await committer.boxed_key(ref, STRANGER.public), STRANGER)
    await get_presigned(committer.presign_get(ref, 60), ref, tmp_path / "got", key=told)
    assert (tmp_path / "got").read_bytes() == STATE
    with pytest.raises(ObjectDamaged):
        await get_presigned(committer.presign_get(ref, 60), ref, tmp_path / "not", key=bytes(32))
    assert await committer.owner(place.secret) == OWNER.public


async def test_only_in_a_private_place_is_what_is_sent_another_than_the_content(store: ArtifactStore) -> None:
    """Else whoever may upload takes the place of a public artifact, or a submission, before it is there."""
    for realm in (REALM_PUBLIC, REALM_HOLDOUT, REALM_SUBMISSION):
        ref = ArtifactRef(digest="d" * 64, size=500, realm=realm)
        _, headers = store.presign_put(ref, 60, hashlib.sha256(STATE).hexdigest())
        assert headers == store.presign_put(ref, 60)[1]


async def test_it_is_copied_and_brought_back_without_keys_and_damage_is_noticed(
    store: ArtifactStore, place: ArtifactRef, tmp_path: Path
) -> None:
    service = of(store, SERVICE, tmp_path / "service")
    ref = await service.put_bytes(STATE, "application/x", place)
    one = next(one for one in await store.objects() if one.key == key_of(ref))
    file = tmp_path / one.key
    file.parent.mkdir(parents=True)
    assert await store.copy(one, file) == "application/x"
    await store.remove(one.key, 0.0)
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 1
    whole = file.read_bytes()
    file.write_bytes(bytes(damaged))
    with pytest.raises(Invalid, match="is damaged"):
        await backups._store(store, tmp_path, one.key, "application/x")
    assert await store.stat(ref) is None
    file.write_bytes(whole)
    await backups._store(store, tmp_path, one.key, "application/x")
    assert await service.get_bytes(ref) == STATE
