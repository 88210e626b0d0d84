"""Reading and writing artifacts by digest, over the S3 API."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.credentials import Provider, StaticProvider
from minio.error import InvalidResponseError, S3Error, ServerError

from connito.errors import ConnitoError, Fatal, Invalid, ObjectDamaged, ObjectMissing, Retry, Unusable
from connito.runtime import metrics
from connito.runtime.settings import ServiceSettings
from connito.runtime.waiting import WAITING
from connito.store.cache import Cache, digest_of_file
from connito.store.client import Client, StoreClock
from connito.store.credentials import provider
from connito.store.presigned import Progress, disk_or_network, presign, save_verified, write_once_headers
from connito.v1 import artifacts_pb2
from connito.v1 import reasons_pb2 as reasons
from connito.v1.artifacts_pb2 import ArtifactRef

T = TypeVar("T")

REALMS = {
    artifacts_pb2.REALM_PUBLIC: "public",
    artifacts_pb2.REALM_HOLDOUT: "holdout",
    artifacts_pb2.REALM_SUBMISSION: "submissions",
}
_DENIED = {
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "RequestTimeTooSkewed",
    "AuthorizationHeaderMalformed",
}
_MISSING = {"NoSuchKey", "NoSuchObject", "ResourceNotFound"}


# What is stored again is written again from this age on.
FRESH_SECONDS = 12 * 3600.0


@dataclass(frozen=True)
class StoredObject:
    """An artifact in the store; `age_s` seconds since it was written, by the store's clock."""

    key: str
    digest: str
    size: int
    age_s: float
    media_type: str


def key_of(ref: ArtifactRef) -> str:
    """Return `<realm>/sha256/<hex>`. Raises `Invalid` for a reference without a realm or with a digest that is none."""
    if ref.realm not in REALMS:
        raise Invalid(f"the reference to {ref.digest[:12]}… names no realm")
    if len(ref.digest) != 64 or not set(ref.digest) <= set("0123456789abcdef"):
        raise Invalid(f"{ref.digest[:80]!r} is not a SHA-256 in lower-case hex")
    return f"{REALMS[ref.realm]}/sha256/{ref.digest}"


def ref_of_bytes(data: bytes, media_type: str, realm: artifacts_pb2.Realm.ValueType) -> ArtifactRef:
    """Return the reference that these bytes have wherever they lie."""
    return ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=len(data), media_type=media_type, realm=realm)


def ref_of_file(path: Path, media_type: str, realm: artifacts_pb2.Realm.ValueType) -> ArtifactRef:
    """Return the reference that a file's bytes have wherever they lie."""
    digest, size = digest_of_file(path)
    return ArtifactRef(digest=digest, size=size, media_type=media_type, realm=realm)


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
    ) -> None:
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise Fatal(f"CONNITO_S3_ENDPOINT must look like http://host:port, not {endpoint!r}")
        self.endpoint, self.bucket, self.region = endpoint, bucket, region
        self._public_endpoint = public_endpoint or endpoint
        self._credentials = credentials or StaticProvider(access_key, secret_key)
        self.cache = Cache(cache_dir, cache_max_bytes)
        self._clock = clock or StoreClock()
        self._client = client or Client(
            parts.netloc, self._clock, credentials=self._credentials,
            secure=parts.scheme == "https", region=region,
        )  # fmt: skip

    @classmethod
    def from_settings(cls, settings: ServiceSettings) -> ArtifactStore:
        """Return the store a service is configured for. Raises `Fatal` when it has no credentials."""
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

    async def put_bytes(
        self, data: bytes, media_type: str, realm: artifacts_pb2.Realm.ValueType = artifacts_pb2.REALM_PUBLIC
    ) -> ArtifactRef:
        """Store bytes; a no-op if they are there."""
        ref = ref_of_bytes(data, media_type, realm)
        await self._call("put", ref.digest, lambda: self._put(ref, io.BytesIO(data)))
        return ref

    async def put_file(
        self,
        path: Path,
        media_type: str,
        realm: artifacts_pb2.Realm.ValueType = artifacts_pb2.REALM_PUBLIC,
        *,
        cache: bool = False,
        known: ArtifactRef | None = None,
    ) -> ArtifactRef:
        """Store a file, streaming; no upload if it is there. `cache`: also put it into the local cache. `known`: its reference,
        where it was hashed while it was written.
        """

        def put() -> ArtifactRef:
            ref = known or ref_of_file(path, media_type, realm)
            with path.open("rb") as file:
                self._put(ref, file)
            if cache:
                self.cache.adopt(path, ref)
            return ref

        return await self._call("put", str(path), put)

    def _put(self, ref: ArtifactRef, body: Any) -> None:
        key = key_of(ref)
        # One that has lain there for long may be nobody's, and about to be collected: the new one is young.
        if (found := self._status(key)) is not None and found.size == ref.size and found.age_s < FRESH_SECONDS:
            return
        self._client.put_object(
            self.bucket, key, body, ref.size, content_type=ref.media_type or "application/octet-stream"
        )
        metrics.STORE_BYTES.labels("up").inc(ref.size)

    # Reading.

    async def get_bytes(self, ref: ArtifactRef) -> bytes:
        """Return the whole artifact in memory. Raises `NotFound`, `VerificationFailed`."""
        key = key_of(ref)
        data = await self._call("get", ref.digest, lambda: self._read(key, 0, 0, limit=ref.size + 1))
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
            response = self._client.get_object(self.bucket, key)
            try:
                save_verified(response.read, ref, path, progress)
            finally:
                response.close()
                response.release_conn()
            downloaded = True

        path = await self._call("fetch", ref.digest, lambda: self.cache.get(ref, download))
        if downloaded:
            # What was in the cache says nothing about the store.
            self._answered("disk")
        elif stored and await self.stat(ref) is None:
            raise ObjectMissing(f"the store has no {ref.digest}")
        return path

    async def read_range(self, ref: ArtifactRef, start: int, length: int, sha256: str | None = None) -> bytes:
        """Return `length` bytes from `start`, checked against their own digest if one is given. Raises `NotFound`,
        `VerificationFailed`, and `Invalid` for a range outside of the artifact."""
        if start < 0 or length < 0 or start + length > ref.size:
            raise Invalid(f"bytes {start} to {start + length} are outside of {ref.digest[:12]}… ({ref.size} bytes)")
        if length == 0:
            return b""
        key = key_of(ref)
        data = await self._call("range", ref.digest, lambda: self._read(key, start, length, limit=length + 1))
        if len(data) != length or (sha256 is not None and hashlib.sha256(data).hexdigest() != sha256):
            raise _damaged("range", ref)
        return data

    async def stat(self, ref: ArtifactRef) -> int | None:
        """Return the size of the stored object, or None if there is none."""
        key = key_of(ref)
        found = await self._call("stat", ref.digest, lambda: self._status(key))
        return None if found is None else found.size

    # Collecting.

    async def objects(self) -> list[StoredObject]:
        """Return every artifact that is stored."""

        def read() -> list[StoredObject]:
            return [
                self._described(found.object_name, found)
                for realm in REALMS.values()
                for found in self._client.list_objects(self.bucket, f"{realm}/sha256/", recursive=True)
                if not found.is_dir
            ]

        return await self._call("list", self.bucket, read)

    async def copy(self, one: StoredObject, path: Path) -> str | None:
        """Write an object to `path`, verified, and return its media type; None if it is gone. Raises `VerificationFailed`."""
        ref = ArtifactRef(digest=one.digest, size=one.size)

        def download() -> str:
            response = self._client.get_object(self.bucket, one.key)
            try:
                save_verified(response.read, ref, path)
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
            if error.code in _MISSING:
                return None
            raise

    def _described(self, key: str, found: Any) -> StoredObject:
        age = (self._clock.now() - found.last_modified).total_seconds()
        return StoredObject(key, key.rpartition("/")[2], int(found.size or 0), age, found.content_type or "")

    # For those without credentials.

    def presign_put(self, ref: ArtifactRef, expires_s: int) -> tuple[str, dict[str, str]]:
        """Return a URL that stores exactly this artifact, once, and the headers that the PUT must carry."""
        headers = write_once_headers(ref)
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
            meaning = self._explain(error, operation, what)
            metrics.STORE_ERRORS.labels(operation, type(meaning).__name__).inc()
            raise meaning from error
        if operation != "fetch":
            self._answered()
        return done

    def _answered(self, *more: str) -> None:
        for dependency in ("store", "credentials", *more):
            WAITING.answered(dependency)

    def _explain(self, error: Exception, operation: str, what: str) -> Exception:
        away = f"the store at {self.endpoint} is away ({operation} {what})"
        if isinstance(error, ConnitoError):
            return error
        if isinstance(error, S3Error):
            if error.code in _MISSING:
                return ObjectMissing(f"the store has no {what}")
            if error.code == "NoSuchBucket":
                text = f"the store has no bucket {self.bucket} yet; create it or check CONNITO_S3_BUCKET"
                return Retry(text, dependency="store")
            if error.code in _DENIED:
                return Unusable(
                    f"the store at {self.endpoint} denies {operation} on {self.bucket} ({error.code}); "
                    "check CONNITO_S3_ACCESS_KEY, CONNITO_S3_SECRET_KEY and the key's policy",
                    dependency="credentials",
                    reason=reasons.REASON_NOT_PERMITTED,
                )
            broken = "; if this stays, restore its files from a copy" if error.code == "InternalError" else ""
            return Retry(f"{away}: {error.code} {error.message}{broken}", dependency="store")
        if isinstance(error, (urllib3.exceptions.HTTPError, ServerError, InvalidResponseError)):
            return Retry(f"{away}: {error}", dependency="store")
        if isinstance(error, OSError):
            return disk_or_network(error, Path(error.filename or what), away)
        return error


def _damaged(operation: str, ref: ArtifactRef) -> ObjectDamaged:
    metrics.STORE_ERRORS.labels(operation, "ObjectDamaged").inc()
    return ObjectDamaged(
        f"what the store returned for {ref.digest} is not it (size or SHA-256 differs); its object is damaged or was "
        "replaced: restore it from a copy"
    )
