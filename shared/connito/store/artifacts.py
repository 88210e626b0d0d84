"""Reading and writing artifacts by digest, over the S3 API."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from minio import Minio
from minio.credentials import Provider, StaticProvider
from minio.error import S3Error

from connito.errors import Fatal, Invalid, ObjectDamaged, ObjectMissing
from connito.runtime import metrics
from connito.runtime.settings import ServiceSettings
from connito.runtime.waiting import WAITING
from connito.store.cache import Cache
from connito.store.client import Client, StoreClock
from connito.store.credentials import provider
from connito.store.explained import MISSING, explained
from connito.store.keyring import Keyring
from connito.store.named import PREFIXES, PRIVATE, StoredObject, key_of, ref_of_bytes, ref_of_file, ref_of_key
from connito.store.presigned import Progress, presign, save_verified, save_whole, write_once_headers
from connito.v1 import artifacts_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire import private
from connito.wire.identity import Identity

T = TypeVar("T")
Place: TypeAlias = artifacts_pb2.Realm.ValueType | ArtifactRef
# A sealed file of 32 bytes has a box of a hundred bytes for each reader.
MAX_SEALED = 1 << 20

# What is stored again is written again from this age on.
FRESH_SECONDS = 12 * 3600.0


class ArtifactStore:
    """One bucket. Every method raises `Retry` while the store is away and `Invalid` when it refuses the credentials."""

    def __init__(
        self,
        endpoint: str,
        access_key: str,
        secret_key: str,
        bucket: str,
        region: str,
        cache_dir: Path,
        public_endpoint: str = "",
        client: Minio | None = None,
        clock: StoreClock | None = None,
        cache_max_bytes: int = 0,
        credentials: Provider | None = None,
        keys: Keyring | None = None,
    ) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise Fatal(f"CONNITO_S3_ENDPOINT must look like http://host:port, not {endpoint!r}")
        self.endpoint, self.bucket, self.region = endpoint, bucket, region
        self._public_endpoint = public_endpoint or endpoint
        self._credentials = credentials or StaticProvider(access_key, secret_key)
        self.cache, self._keys = Cache(cache_dir, cache_max_bytes), keys or Keyring()
        self._clock = clock or StoreClock()
        self._client = client or Client(
            parts.netloc, self._clock, credentials=self._credentials,
            secure=parts.scheme == "https", region=region,
        )  # fmt: skip

    @classmethod
    def from_settings(cls, settings: ServiceSettings, me: Identity | None = None) -> ArtifactStore:
        """Return the store a service is configured for; `me` opens what is private. Raises `Fatal` without credentials."""
        credentials = provider(settings)
        if credentials is None:
            raise Fatal(
                "this service needs the store: set CONNITO_S3_ACCESS_KEY and CONNITO_S3_SECRET_KEY, or CONNITO_S3_CREDENTIALS"
            )
        return cls(
            settings.s3_endpoint,
            settings.s3_access_key,
            settings.s3_secret_key.get_secret_value(),
            settings.s3_bucket,
            settings.s3_region,
            settings.cache_dir,
            settings.s3_public_endpoint,
            cache_max_bytes=settings.cache_max_bytes,
            credentials=credentials,
            keys=Keyring(me, settings.lent),
        )

    async def ensure_bucket(self) -> None:
        """Create the bucket unless it exists."""

        def create() -> None:
            if not self._client.bucket_exists(self.bucket):
                try:
                    self._client.make_bucket(self.bucket, self.region)
                except S3Error as error:
                    if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                        raise

        await self._call("ensure_bucket", self.bucket, create)

    # Writing.

    async def put_bytes(self, data: bytes, media_type: str, place: Place = artifacts_pb2.REALM_PUBLIC) -> ArtifactRef:
        """Store bytes; a no-op if they are there. `place`: a realm, or `wire.private.placed`."""
        ref = ref_of_bytes(data, media_type, place)
        await self._call("put", ref.digest, lambda: self._put(ref, io.BytesIO(data)))
        return ref

    async def put_file(
        self,
        path: Path,
        media_type: str,
        place: Place = artifacts_pb2.REALM_PUBLIC,
        *,
        cache: bool = False,
        known: ArtifactRef | None = None,
        anew: bool = False,
    ) -> ArtifactRef:
        """Store a file, streaming; no upload if it is there. `cache`: also put it into the local cache. `known`: its reference,
        where it was hashed while it was written. `anew`: also over what lies there, which may be damaged.
        """

        def put() -> ArtifactRef:
            ref = known or ref_of_file(path, media_type, place)
            with path.open("rb") as file:
                self._put(ref, file, anew=anew)
            if cache:
                self.cache.adopt(path, ref)
            return ref

        return await self._call("put", str(path), put)

    def _put(self, ref: ArtifactRef, body: Any, *, anew: bool = False) -> None:
        key = key_of(ref)
        # One that has lain there for long may be nobody's, and about to be collected: the new one is young.
        size = private.stored_bytes(ref.size) if ref.realm == PRIVATE else ref.size
        found = None if anew else self._status(key)
        if found is not None and found.size == size and found.age_s < FRESH_SECONDS:
            return
        if ref.realm == PRIVATE:
            body = private.closed(body, ref.secret, self._keys.key(ref, self._sealed))
        self._upload(key, body, size, ref.media_type)

    def _upload(self, key: str, body: Any, size: int, media_type: str) -> None:
        self._client.put_object(self.bucket, key, body, size, content_type=media_type or "application/octet-stream")
        metrics.STORE_BYTES.labels("up").inc(size)

    async def put_copy(self, path: Path, key: str, media_type: str) -> None:
        """Store again what `copy` wrote, at its key."""

        def put() -> None:
            with path.open("rb") as file:
                self._upload(key, file, path.stat().st_size, media_type)

        await self._call("put", key, put)

    # Reading.

    async def get_bytes(self, ref: ArtifactRef) -> bytes:
        """Return the whole artifact in memory. Raises `NotFound`, `VerificationFailed`."""
        key, limit = key_of(ref), private.stored_bytes(ref.size) if ref.realm == PRIVATE else ref.size

        def read() -> bytes:
            stored = self._read(key, 0, 0, limit=limit + 1)
            return stored if ref.realm != PRIVATE else self._clear(io.BytesIO(stored).read, ref).read()

        data = await self._call("get", ref.digest, read)
        if len(data) != ref.size or hashlib.sha256(data).hexdigest() != ref.digest:
            raise _damaged("get", ref)
        return data

    async def fetch(self, ref: ArtifactRef, *, progress: Progress | None = None, stored: bool = False) -> Path:
        """Return the artifact as a read-only file in the local cache, verified. Raises `NotFound`,
        `VerificationFailed`, and `Invalid` naming the folder when the disk is full. `progress(done, total)` is called
        from another thread. `stored`: raise `NotFound` also where the cache has it and the store has not.
        """
        key, downloaded = key_of(ref), False

        def download(path: Path) -> None:
            nonlocal downloaded
            self._save(key, ref, path, progress)
            downloaded = True

        path = await self._call("fetch", ref.digest, lambda: self.cache.get(ref, download))
        if downloaded:
            # What was in the cache says nothing about the store.
            self._answered("disk")
        elif stored and await self.stat(ref) is None:
            raise ObjectMissing(f"the store has no {ref.digest}; restore it from a copy")
        return path

    async def download(self, ref: ArtifactRef, path: Path) -> None:
        """Write what the store itself has, verified, to `path`. Raises as `fetch`."""
        key = key_of(ref)
        await self._call("fetch", ref.digest, lambda: self._save(key, ref, path))

    def _save(self, key: str, ref: ArtifactRef, path: Path, progress: Progress | None = None) -> None:
        response = self._client.get_object(self.bucket, key)
        try:
            save_verified(
                self._clear(response.read, ref).read if ref.realm == PRIVATE else response.read, ref, path, progress
            )
        finally:
            response.close()
            response.release_conn()

    def _clear(self, read: Callable[[int], bytes], ref: ArtifactRef) -> private.Stream:
        return private.opened(read, ref, self._keys.key(ref, self._sealed))

    def _sealed(self, secret: str) -> bytes:
        """Return the sealed file of a run's secret."""
        key = key_of(ArtifactRef(digest=secret, realm=artifacts_pb2.REALM_PUBLIC))
        data = self._read(key, 0, 0, limit=MAX_SEALED)
        if hashlib.sha256(data).hexdigest() != secret:
            raise _damaged("get", ArtifactRef(digest=secret))
        return data

    async def sealed_secret(self, secret: str) -> bytes:
        """Return the sealed file of a secret, by its digest. Raises `ObjectMissing`, `ObjectDamaged`."""
        return await self._call("get", secret, lambda: self._sealed(secret))

    async def owner(self, secret: str) -> str:
        """Return whose the secret is that private artifacts are encrypted under. Raises `NoKey` for who may not open it."""
        return await self._call("get", secret, lambda: self._keys.owner(secret, self._sealed))

    async def is_owner(self, secret: str, customer: str) -> bool:
        """Return whether a secret is a customer's, who has stored it: what somebody made up is nobody's. Raises as `owner`."""
        with suppress(ObjectMissing, ObjectDamaged):
            return await self.owner(secret) == customer
        return False

    async def boxed_key(self, ref: ArtifactRef, reader: str) -> bytes:
        """Return the key of a private artifact in a box for `reader`."""
        key = await self._call("get", ref.secret, lambda: self._keys.key(ref, self._sealed))
        return private.boxed(key, reader)

    async def read_range(self, ref: ArtifactRef, start: int, length: int, sha256: str | None = None) -> bytes:
        """Return `length` bytes from `start`, checked against their own digest if one is given. Raises `NotFound`,
        `VerificationFailed`, and `Invalid` for a range outside of the artifact, or of one that is encrypted."""
        if ref.realm == PRIVATE or start < 0 or length < 0 or start + length > ref.size:
            raise Invalid(f"bytes {start} to {start + length} are outside of {ref.digest[:12]}… ({ref.size} bytes)")
        if length == 0:
            return b""
        key = key_of(ref)
        data = await self._call("range", ref.digest, lambda: self._read(key, start, length, limit=length + 1))
        if len(data) != length or (sha256 is not None and hashlib.sha256(data).hexdigest() != sha256):
            raise _damaged("range", ref)
        return data

    async def stat(self, ref: ArtifactRef) -> int | None:
        """Return the size of a stored artifact, or None if there is none."""
        key = key_of(ref)
        found = await self._call("stat", ref.digest, lambda: self._status(key))
        if found is None:
            return None
        return private.content_bytes(found.size) if ref.realm == PRIVATE else found.size

    # Collecting.

    async def objects(self) -> list[StoredObject]:
        """Return every artifact that is stored."""

        def read() -> list[StoredObject]:
            return [
                self._described(found.object_name, found)
                for prefix in PREFIXES
                for found in self._client.list_objects(self.bucket, prefix, recursive=True)
                if not found.is_dir
            ]

        return await self._call("list", self.bucket, read)

    async def copy(self, one: StoredObject, path: Path) -> str | None:
        """Write an object to `path` as it is stored, verified, and return its media type; None if it is gone. Raises
        `VerificationFailed`.
        """
        ref = ref_of_key(one.key, one.size)

        def download() -> str:
            response = self._client.get_object(self.bucket, one.key)
            try:
                if ref.realm != PRIVATE:
                    save_verified(response.read, ref, path)
                elif not save_whole(response.read, path):
                    raise _damaged("copy", ref)
            finally:
                response.close()
                response.release_conn()
            return str(response.headers.get("content-type", ""))

        with suppress(ObjectMissing):
            return await self._call("copy", one.digest, download)
        return None

    async def media_type(self, key: str) -> str:
        """Return what the object at `key` was stored as; empty if it is gone."""
        found = await self._call("stat", key, lambda: self._status(key))
        return "" if found is None else found.media_type

    async def remove(self, key: str, older_than_s: float) -> bool:
        """Delete the object at `key` unless somebody has stored it anew by now; return whether it is gone."""

        def delete() -> bool:
            found = self._status(key)
            if found is not None and found.age_s < older_than_s:
                return False
            self._client.remove_object(self.bucket, key)
            return True

        return await self._call("remove", key, delete)

    def _read(self, key: str, start: int, length: int, limit: int) -> bytes:
        response = self._client.get_object(self.bucket, key, offset=start, length=length)
        try:
            data: bytes = response.read(limit)
        finally:
            response.close()
            response.release_conn()
        metrics.STORE_BYTES.labels("down").inc(len(data))
        return data

    def _status(self, key: str) -> StoredObject | None:
        try:
            return self._described(key, self._client.stat_object(self.bucket, key))
        except S3Error as error:
            if error.code in MISSING:
                return None
            raise

    def _described(self, key: str, found: Any) -> StoredObject:
        age = (self._clock.now() - found.last_modified).total_seconds()
        return StoredObject(key, key.rpartition("/")[2], int(found.size or 0), age, found.content_type or "")

    # For those without credentials.

    def presign_put(self, ref: ArtifactRef, expires_s: int, sent: str = "") -> tuple[str, dict[str, str]]:
        """Return a URL that stores exactly this artifact, once, and the headers that the PUT must carry. `sent`: of a private
        one, the SHA-256 of its encrypted form.
        """
        stored = ref
        if ref.realm == PRIVATE:
            stored = ArtifactRef(digest=sent, size=private.stored_bytes(ref.size))
        headers = write_once_headers(stored)
        return self._presign("PUT", ref, headers, expires_s), headers

    def presign_get(self, ref: ArtifactRef, expires_s: int) -> str:
        """Return a URL that reads this artifact."""
        return self._presign("GET", ref, {}, expires_s)

    def _presign(self, method: str, ref: ArtifactRef, headers: dict[str, str], expires_s: int) -> str:
        given = self._credentials.retrieve()
        return presign(
            method,
            self._public_endpoint,
            f"/{self.bucket}/{key_of(ref)}",
            headers,
            access_key=given.access_key,
            secret_key=given.secret_key,
            region=self.region,
            expires_s=expires_s,
            now=self._clock.now(),
            session_token=given.session_token or "",
        )

    async def _call(self, operation: str, what: str, work: Callable[[], T]) -> T:
        """Run blocking work in a thread and translate what it raises."""
        try:
            with metrics.STORE_SECONDS.labels(operation).time():
                done = await asyncio.to_thread(work)
        except Exception as error:
            meaning = explained(error, operation, what, self.endpoint, self.bucket)
            metrics.STORE_ERRORS.labels(operation, type(meaning).__name__).inc()
            raise meaning from error
        if operation != "fetch":
            self._answered()
        return done

    def _answered(self, *more: str) -> None:
        for dependency in ("store", "credentials", *more):
            WAITING.answered(dependency)


def _damaged(operation: str, ref: ArtifactRef) -> ObjectDamaged:
    metrics.STORE_ERRORS.labels(operation, "ObjectDamaged").inc()
    return ObjectDamaged(
        f"what the store returned for {ref.digest} is not it (size or SHA-256 differs); its object is damaged or was "
        "replaced: restore it from a copy"
    )
