"""The artifact store against a real SeaweedFS: verified reads, the shared cache, write-once uploads, failures."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from connito.errors import Invalid, NotFound, Retry, Unusable, VerificationFailed
from connito.platform.servers import ObjectStore
from connito.store import ArtifactStore, get_presigned, key_of, put_presigned, ref_of_bytes
from connito.store.client import StoreClock
from connito.v1 import artifacts_pb2, reasons_pb2
from connito.v1.artifacts_pb2 import ArtifactRef

from tests.support.clocks import set_clock

pytestmark = pytest.mark.integration

PUBLIC, SUBMISSION = artifacts_pb2.REALM_PUBLIC, artifacts_pb2.REALM_SUBMISSION


def sibling(store: ArtifactStore, object_store: ObjectStore, cache: Path, secret: str = "") -> ArtifactStore:
    return ArtifactStore(
        store.endpoint, object_store.access_key, secret or object_store.secret_key, store.bucket, store.region, cache
    )


async def overwrite(store: ArtifactStore, ref: ArtifactRef, data: bytes) -> None:
    """What a faulty store, or a thief with its credentials, would do."""
    import io

    await asyncio.to_thread(store._client.put_object, store.bucket, key_of(ref), io.BytesIO(data), len(data))


class TestBytesAndFiles:
    async def test_round_trip(self, store: ArtifactStore) -> None:
        data = os.urandom(100_000)
        ref = await store.put_bytes(data, "application/octet-stream", artifacts_pb2.REALM_HOLDOUT)
        assert (ref.digest, ref.size) == (hashlib.sha256(data).hexdigest(), 100_000)
        assert key_of(ref) == f"holdout/sha256/{ref.digest}"
        assert await store.get_bytes(ref) == data
        assert await store.stat(ref) == 100_000

    async def test_nothing_is_an_artifact_too(self, store: ArtifactStore) -> None:
        ref = await store.put_bytes(b"", "text/plain")
        assert await store.get_bytes(ref) == b""
        assert (await store.fetch(ref)).read_bytes() == b""

    async def test_large_file_goes_in_parts_and_comes_back(self, store: ArtifactStore, tmp_path: Path) -> None:
        path = tmp_path / "large"
        path.write_bytes(os.urandom(1 << 20) * 21)
        ref = await store.put_file(path, "application/octet-stream")
        seen: list[tuple[int, int]] = []
        fetched = await store.fetch(ref, progress=lambda done, total: seen.append((done, total)))
        assert fetched.read_bytes() == path.read_bytes()
        assert seen[-1] == (ref.size, ref.size)
        assert len(seen) >= 21

    async def test_second_upload_is_skipped(
        self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"once")
        first = await store.put_file(path, "text/plain")

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("uploaded again")

        monkeypatch.setattr(store._client, "put_object", refuse)
        assert await store.put_file(path, "text/plain") == first

    async def test_put_file_can_fill_the_cache(
        self, store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"cached")
        ref = await store.put_file(path, "text/plain", cache=True)
        path.write_bytes(b"changed later")
        monkeypatch.setattr(store._client, "get_object", None)
        assert (await store.fetch(ref)).read_bytes() == b"cached"

    async def test_missing_is_not_found(self, store: ArtifactStore) -> None:
        ref = ref_of_bytes(b"never stored", "text/plain", PUBLIC)
        assert await store.stat(ref) is None
        for read in (store.get_bytes(ref), store.fetch(ref), store.read_range(ref, 0, 2)):
            with pytest.raises(NotFound) as caught:
                await read
            assert caught.value.reason == reasons_pb2.REASON_ARTIFACT_MISSING

    async def test_wrong_bytes_are_never_returned(self, store: ArtifactStore) -> None:
        ref = await store.put_bytes(b"the truth", "text/plain")
        for lie in (b"another 1", b"longer than before", b"short"):
            await overwrite(store, ref, lie)
            with pytest.raises((VerificationFailed, Retry)):
                await store.get_bytes(ref)
            with pytest.raises((VerificationFailed, Retry)):
                await store.fetch(ref)
        assert not store.cache.path(ref).exists()

    @pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "a" * 63])
    async def test_a_digest_that_is_none_is_refused(self, store: ArtifactStore, digest: Any) -> None:
        with pytest.raises(Invalid, match="SHA-256"):
            await store.get_bytes(ArtifactRef(digest=digest, size=1, realm=PUBLIC))

    async def test_realm_is_required(self, store: ArtifactStore) -> None:
        with pytest.raises(Invalid, match="realm"):
            await store.put_bytes(b"x", "text/plain", artifacts_pb2.REALM_UNSPECIFIED)


class TestRanges:
    async def test_range_with_its_digest(self, store: ArtifactStore) -> None:
        data = os.urandom(50_000)
        ref = await store.put_bytes(data, "application/octet-stream")
        part = data[12_345:20_000]
        digest = hashlib.sha256(part).hexdigest()
        assert await store.read_range(ref, 12_345, len(part), digest) == part
        assert await store.read_range(ref, 49_999, 1) == data[-1:]
        assert await store.read_range(ref, 10, 0) == b""
        with pytest.raises(VerificationFailed):
            await store.read_range(ref, 12_346, len(part), digest)

    @pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 11), (10, 1), (5, -1)])
    async def test_outside_is_refused(self, store: ArtifactStore, start: Any, length: Any) -> None:
        ref = await store.put_bytes(b"0123456789", "text/plain")
        with pytest.raises(Invalid, match="outside"):
            await store.read_range(ref, start, length)


class TestCache:
    async def test_hit_needs_no_store(self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
        ref = await store.put_bytes(b"data" * 1000, "text/plain")
        path = await store.fetch(ref)
        assert path.stat().st_mode & 0o222 == 0
        monkeypatch.setattr(store._client, "get_object", None)
        assert await store.fetch(ref) == path

    @pytest.mark.parametrize("damage", [b"DATA" * 1000, b"data", b""])
    async def test_corrupt_is_fetched_again(self, store: ArtifactStore, damage: Any) -> None:
        ref = await store.put_bytes(b"data" * 1000, "text/plain")
        path = await store.fetch(ref)
        path.chmod(0o644)
        path.write_bytes(damage)
        assert (await store.fetch(ref)).read_bytes() == b"data" * 1000

    async def test_many_fetch_once(
        self, store: ArtifactStore, object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref = await store.put_bytes(os.urandom(2 << 20), "application/octet-stream")
        others = [sibling(store, object_store, tmp_path / "cache") for _ in range(4)]
        fetched: list[int] = []
        for number, other in enumerate(others):
            original = other._client.get_object

            def count(*args: object, _original: Any = original, _number: Any = number, **options: object) -> object:
                fetched.append(_number)
                return _original(*args, **options)

            monkeypatch.setattr(other._client, "get_object", count)
        paths = await asyncio.gather(*(other.fetch(ref) for other in others))
        assert len(fetched) == 1
        assert len(set(paths)) == 1

    async def test_a_folder_that_cannot_be_written_is_named(
        self, store: ArtifactStore, object_store: ObjectStore, tmp_path: Path
    ) -> None:
        ref = await store.put_bytes(b"data", "text/plain")
        blocked = tmp_path / "blocked"
        blocked.write_text("a file where the folder should be")
        with pytest.raises((Invalid, Retry), match="blocked"):
            await sibling(store, object_store, blocked).fetch(ref)

    async def test_a_full_disk_names_path_and_remedy(
        self, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ref = await store.put_bytes(b"data", "text/plain")

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("connito.store.artifacts.save_verified", full)
        with pytest.raises(Invalid, match=r"cache.*No space left.*CONNITO_CACHE_DIR"):
            await store.fetch(ref)


class TestPresigned:
    @pytest.fixture
    def work(self, tmp_path: Path) -> tuple[Path, ArtifactRef]:
        path = tmp_path / "submission"
        path.write_bytes(os.urandom(300_000))
        return path, ref_of_bytes(path.read_bytes(), "application/octet-stream", SUBMISSION)

    async def test_written_once_then_present(self, store: ArtifactStore, work: Any) -> None:
        path, ref = work
        url, headers = store.presign_put(ref, 60)
        assert await put_presigned(url, headers, path) is True
        assert await put_presigned(url, headers, path) is False
        assert await store.get_bytes(ref) == path.read_bytes()

    async def test_other_bytes_of_the_same_length(self, store: ArtifactStore, work: Any, tmp_path: Path) -> None:
        _, ref = work
        url, headers = store.presign_put(ref, 60)
        other = tmp_path / "other"
        other.write_bytes(bytes(ref.size))
        with pytest.raises(VerificationFailed):
            await put_presigned(url, headers, other)
        assert await store.stat(ref) is None

    async def test_other_bytes_with_their_own_checksum(self, store: ArtifactStore, work: Any, tmp_path: Path) -> None:
        _, ref = work
        url, headers = store.presign_put(ref, 60)
        other = tmp_path / "other"
        other.write_bytes(bytes(ref.size))
        digest = base64.b64encode(hashlib.sha256(bytes(ref.size)).digest()).decode()
        with pytest.raises(Invalid) as caught:
            await put_presigned(url, headers | {"x-amz-checksum-sha256": digest}, other)
        assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED
        assert await store.stat(ref) is None

    async def test_another_length(self, store: ArtifactStore, work: Any, tmp_path: Path) -> None:
        path, ref = work
        url, headers = store.presign_put(ref, 60)
        longer = tmp_path / "longer"
        longer.write_bytes(path.read_bytes() + b"x")
        with pytest.raises((Invalid, VerificationFailed)):
            await put_presigned(url, headers | {"content-length": str(ref.size + 1)}, longer)
        assert await store.stat(ref) is None

    @pytest.mark.parametrize("left_out", ["if-none-match", "x-amz-checksum-sha256"])
    async def test_leaving_a_condition_out(self, store: ArtifactStore, work: Any, left_out: Any) -> None:
        path, ref = work
        url, headers = store.presign_put(ref, 60)
        with pytest.raises(Invalid):
            await put_presigned(url, {k: v for k, v in headers.items() if k != left_out}, path)
        assert await store.stat(ref) is None

    async def test_what_stands_is_not_replaced(self, store: ArtifactStore, work: Any) -> None:
        path, ref = work
        await overwrite(store, ref, b"what was there before")
        url, headers = store.presign_put(ref, 60)
        assert await put_presigned(url, headers, path) is False
        assert await store.stat(ref) == len(b"what was there before")

    async def test_expired(self, store: ArtifactStore, work: Any) -> None:
        path, ref = work
        url, headers = store.presign_put(ref, 1)
        await asyncio.sleep(2.1)
        with pytest.raises(Invalid, match="ask for a new one"):
            await put_presigned(url, headers, path)

    async def test_download_is_verified(self, store: ArtifactStore, tmp_path: Path) -> None:
        ref = await store.put_bytes(b"public" * 1000, "text/plain")
        url, target = store.presign_get(ref, 60), tmp_path / "target"
        await get_presigned(url, ref, target)
        assert target.read_bytes() == b"public" * 1000
        target.unlink()
        await overwrite(store, ref, b"PUBLIC" * 1000)
        with pytest.raises(VerificationFailed):
            await get_presigned(url, ref, target)
        assert not target.exists()

    async def test_a_url_is_good_for_its_object_only(self, store: ArtifactStore, tmp_path: Path) -> None:
        secret = await store.put_bytes(b"held out", "text/plain", artifacts_pb2.REALM_HOLDOUT)
        public = await store.put_bytes(b"for all", "text/plain")
        url = store.presign_get(public, 60).replace(key_of(public), key_of(secret))
        with pytest.raises(Invalid):
            await get_presigned(url, secret, tmp_path / "loot")

    async def test_nothing_listens(self, store: ArtifactStore, work: Any) -> None:
        path, _ = work
        with pytest.raises(Retry, match=r"127\.0\.0\.1:1"):
            await put_presigned("http://127.0.0.1:1/bucket/key?x=1", {}, path)


class TestFailures:
    async def test_store_away_is_retry(self, store: ArtifactStore, tmp_path: Path) -> None:
        away = ArtifactStore("http://127.0.0.1:1", "key", "secret", "bucket", "us-east-1", tmp_path)
        ref = ref_of_bytes(b"x", "text/plain", PUBLIC)
        for call in (away.put_bytes(b"x", "text/plain"), away.fetch(ref), away.stat(ref), away.ensure_bucket()):
            with pytest.raises(Retry, match="is away"):
                await call

    async def test_wrong_credentials_say_so(
        self, store: ArtifactStore, object_store: ObjectStore, tmp_path: Path
    ) -> None:
        stranger = sibling(store, object_store, tmp_path / "c", secret="wrong-secret-key")
        with pytest.raises(Invalid, match="CONNITO_S3_SECRET_KEY") as caught:
            await stranger.put_bytes(b"x", "text/plain")
        assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED

    async def test_what_was_acknowledged_survives_a_kill(self, tmp_path: Path) -> None:
        with ObjectStore(tmp_path / "weed") as server:
            artifacts = ArtifactStore(
                server.url, server.access_key, server.secret_key, "bucket", "us-east-1", tmp_path / "c"
            )
            await artifacts.ensure_bucket()
            data = os.urandom(1 << 20)
            ref = await artifacts.put_bytes(data, "application/octet-stream")
            server.kill()
            with pytest.raises(Retry):
                await artifacts.get_bytes(ref)
            await asyncio.to_thread(server.start)
            assert await artifacts.get_bytes(ref) == data


@pytest.mark.parametrize("minutes", [-30, -16, 16, 30, 60 * 24 * 400])
class TestClocks:
    """A machine whose clock is wrong by more than a store bears in a signature."""

    @pytest.fixture
    def skewed(self, store: ArtifactStore, object_store: ObjectStore, tmp_path: Path, minutes: int) -> ArtifactStore:
        clock = StoreClock(lambda: time.time() + 60 * minutes)
        return ArtifactStore(
            store.endpoint, object_store.access_key, object_store.secret_key, store.bucket, store.region,
            tmp_path / "skewed", clock=clock,
        )  # fmt: skip

    async def test_the_first_request_of_any_kind_works(self, store: ArtifactStore, skewed: ArtifactStore) -> None:
        ref = await store.put_bytes(os.urandom(100), "text/plain")
        assert (await skewed.fetch(ref)).stat().st_size == 100

    async def test_it_writes(self, store: ArtifactStore, skewed: ArtifactStore) -> None:
        ref = await skewed.put_bytes(os.urandom(100), "text/plain")
        assert await store.stat(ref) == 100

    async def test_its_links_are_good_for_as_long_as_they_say(
        self, skewed: ArtifactStore, tmp_path: Path, minutes: int
    ) -> None:
        data, upload = os.urandom(100), tmp_path / "upload"
        upload.write_bytes(data)
        ref = ref_of_bytes(data, "text/plain", SUBMISSION)
        assert await skewed.stat(ref) is None
        url, headers = skewed.presign_put(ref, 60)
        assert await put_presigned(url, headers, upload)
        await get_presigned(skewed.presign_get(ref, 60), ref, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == data


@pytest.fixture
def jumping(object_store: ObjectStore) -> Iterator[Callable[[int], None]]:
    """Sets the clock of the store while it runs."""
    yield lambda ahead: set_clock(object_store.pid, ahead)
    set_clock(object_store.pid, 0)


async def test_a_store_whose_clock_is_set_while_it_runs_takes_what_it_took_before(
    store: ArtifactStore, jumping: Callable[[int], None], tmp_path: Path
) -> None:
    for ahead in (1800, 0, -1800, 7 * 86400):
        jumping(ahead)
        ref = await store.put_bytes(os.urandom(100), "text/plain")
        await get_presigned(store.presign_get(ref, 60), ref, tmp_path / "back")
        jumping(ahead + 1800)
        assert (await store.fetch(ref)).stat().st_size == 100


async def test_a_store_that_checks_another_time_than_it_tells_is_named_with_its_clock(
    store: ArtifactStore, object_store: ObjectStore, jumping: Callable[[int], None], tmp_path: Path
) -> None:
    """A proxy in front of it says what time it is there. That is no fault of the key, and goes once a clock is set."""
    served = await asyncio.start_server(partial(dated, object_store.ports["s3"]), "127.0.0.1", 0)
    port = served.sockets[0].getsockname()[1]
    behind = ArtifactStore(
        f"http://127.0.0.1:{port}",
        object_store.access_key,
        object_store.secret_key,
        store.bucket,
        store.region,
        tmp_path,
    )
    async with served:
        ref = await behind.put_bytes(b"late", "text/plain")
        jumping(1800)
        with pytest.raises(Unusable, match="set the clocks of the store and of the proxy") as refused:
            await behind.get_bytes(ref)
        assert refused.value.dependency == "store"
        # An answer to HEAD has no body that says why.
        with pytest.raises(Unusable, match="the clocks of the store and of a proxy"):
            await behind.stat(ref)
        jumping(0)
        assert await behind.get_bytes(ref) == b"late"


async def dated(store: int, caller: asyncio.StreamReader, answer: asyncio.StreamWriter) -> None:
    """Hand one connection on to the store, and its answers back with the time that it is here."""
    reader, writer = await asyncio.open_connection("127.0.0.1", store)

    async def there() -> None:
        while part := await caller.read(1 << 16):
            writer.write(part)

    handing = asyncio.create_task(there())
    with suppress(asyncio.CancelledError):
        while part := await reader.read(1 << 16):
            now = formatdate(usegmt=True).encode()
            answer.write(re.sub(rb"\r\nDate: [^\r]*", b"\r\nDate: " + now, part))
    handing.cancel()
    answer.close()
    writer.close()
