"""Requests of a miner to others: the coordinator's and the committer's APIs, and artifacts by presigned URLs."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc.aio
from connito.bus import Bus
from connito.errors import Invalid, NotFound, Retry, VerificationFailed
from connito.service import rpc
from connito.store import get_presigned, put_presigned
from connito.store.cache import Cache
from connito.v1 import reasons_pb2, services_pb2, services_pb2_grpc
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.invites import parse
from connito.wire.private import unboxed
from connito.wire.tls import Tls
from google.protobuf.message import Message

# The facts that a request rests on may reach the other side a moment after they reached us.
_CATCHING_UP = (
    reasons_pb2.REASON_WRONG_WINDOW,
    reasons_pb2.REASON_NO_COMMITMENT,
    reasons_pb2.REASON_UNKNOWN_RUN,
    reasons_pb2.REASON_NOT_ENROLLED,
    reasons_pb2.REASON_QUOTA_EXCEEDED,
)
RANGE_ATTEMPTS = 4


class Services:
    """Signed calls. Raises what the other side raised; a side that is only behind the log is `Retry`."""

    def __init__(self, bus: Bus, connect: Callable[[str, Tls], grpc.aio.Channel] = rpc.channel) -> None:
        self._bus, self._connect = bus, connect
        # By address, and by what its certificates were made of: others came where those were renewed.
        self._channels: dict[object, grpc.aio.Channel] = {}

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close(None)

    async def enrol(self, run: str, label: str, invite: str = "") -> None:
        """Take part in a run, with an invite's token if there is one. Raises `Invalid` with the reason if not let in."""
        command = services_pb2.EnrolMinerCommand(run=run, label=label)
        if invite:
            command.invite.CopyFrom(parse(invite))
        passes = self._bus.identity.passes
        request = services_pb2.EnrolMinerRequest(
            envelope=self._seal("EnrolMiner", command), admission=passes[0] if passes else ""
        )
        await self._call("coordinator", services_pb2_grpc.RunServiceStub, "EnrolMiner", request)

    async def upload_slot(self, command: services_pb2.UploadCommand) -> services_pb2.RequestUploadResponse:
        """Return the upload slot for the artifact that a commitment opens to."""
        request = services_pb2.RequestUploadRequest(envelope=self._seal("RequestUpload", command))
        answer = await self._call("committer", services_pb2_grpc.SubmissionServiceStub, "RequestUpload", request)
        assert isinstance(answer, services_pb2.RequestUploadResponse)
        return answer

    async def upload(self, slot: services_pb2.RequestUploadResponse, path: Path) -> bool:
        """Send a file into a slot; False when the object is there already. Raises `Unusable` where another slot is needed."""
        return await put_presigned(slot.url, slot.headers, path)

    async def downloads(self, run: str, digests: Sequence[str]) -> services_pb2.RequestDownloadsResponse:
        """Return addresses, and boxes with keys, for artifacts that a run entitles to."""
        command = services_pb2.DownloadsCommand(run=run, digests=digests)
        request = services_pb2.RequestDownloadsRequest(envelope=self._seal("RequestDownloads", command))
        answer = await self._call("committer", services_pb2_grpc.SubmissionServiceStub, "RequestDownloads", request)
        assert isinstance(answer, services_pb2.RequestDownloadsResponse)
        return answer

    def unboxed(self, box: bytes) -> bytes:
        """Return the key in a box of the committer's."""
        return unboxed(box, self._bus.identity)

    def _seal(self, method: str, command: Message) -> Any:
        return self._bus.seal(f"rpc.{method}", command)

    async def _call(self, service: str, stub: Callable[[Any], Any], method: str, request: Message) -> Any:
        address = await self._bus.find_endpoint(service)
        tls = self._bus.tls
        way = address, () if tls.api == "off" else tls.files()
        if way not in self._channels:
            self._channels[way] = self._connect(address, tls)
        try:
            return await rpc.call(getattr(stub(self._channels[way]), method), request)
        except Retry as error:
            raise await rpc.explained(error, address, tls) from error
        except Invalid as error:
            if error.reason in _CATCHING_UP:
                raise Retry(f"the {service} has not accepted yet: {error}", after=max(0.3, error.after)) from error
            raise


class Downloads:
    """Public artifacts of a run, fetched without credentials into the machine's cache and verified."""

    def __init__(self, services: Services, cache_dir: Path, cache_max_bytes: int = 0) -> None:
        self._services = services
        self.cache = Cache(cache_dir, cache_max_bytes)
        # Not the loop's own pool: a download waits here while its transfer runs there.
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="download")

    def cached(self, ref: ArtifactRef) -> Path | None:
        """Return the verified file, if this machine has it already."""
        try:
            return self.cache.get(ref, _absent)
        except _AbsentError:
            return None

    async def fetch(self, run: str, ref: ArtifactRef) -> Path:
        """Return the artifact as a verified file. Raises `Retry`, `NotFound`, `VerificationFailed`."""
        loop = asyncio.get_running_loop()
        path = await loop.run_in_executor(self._pool, self.cached, ref)
        if path is not None:
            return path
        answer = await self._asked(run, [ref])
        url, key = answer.urls[ref.digest], self._services.unboxed(answer.keys[ref.digest])

        def download(target: Path) -> None:
            asyncio.run_coroutine_threadsafe(get_presigned(url, ref, target, key=key), loop).result()

        return await loop.run_in_executor(self._pool, self.cache.get, ref, download)

    async def urls(self, run: str, refs: Sequence[ArtifactRef]) -> list[str]:
        """Return presigned URLs that read `refs`. Raises `NotFound` when the committer serves no such artifact."""
        answer = await self._asked(run, refs)
        return [answer.urls[ref.digest] for ref in refs]

    async def _asked(self, run: str, refs: Sequence[ArtifactRef]) -> services_pb2.RequestDownloadsResponse:
        answer = await self._services.downloads(run, [ref.digest for ref in refs])
        for ref in refs:
            if ref.digest not in answer.urls:
                raise NotFound(
                    f"the committer serves no artifact {ref.digest[:12]}… in run {run}; the run's data is incomplete",
                    reason=reasons_pb2.REASON_ARTIFACT_MISSING,
                )
        return answer


class _AbsentError(Exception):
    """The cache has no such file."""


def _absent(_: Path) -> None:
    raise _AbsentError


class RangeReader:
    """Byte ranges of one object through its presigned URL, over one connection. Blocking; for one thread."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(parts.netloc, timeout=60)
        self._target, self._where = f"{parts.path}?{parts.query}", parts.netloc

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def read(self, start: int, length: int, sha256: str = "") -> bytes:
        """Return `length` bytes from `start`, checked against their digest if one is given.

        Raises `Retry` when the store is away and `VerificationFailed` for other bytes than were asked for.
        """
        for attempt in range(1, RANGE_ATTEMPTS + 1):
            try:
                data = self._get(start, length)
                break
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if attempt == RANGE_ATTEMPTS:
                    raise Retry(f"reading a range from {self._where} broke off: {error!r}") from error
        if len(data) != length or (sha256 and hashlib.sha256(data).hexdigest() != sha256):
            raise VerificationFailed(
                f"the store at {self._where} returned other bytes than {length} from {start} of this object",
                reason=reasons_pb2.REASON_DIGEST_MISMATCH,
            )
        return data

    def _get(self, start: int, length: int) -> bytes:
        headers = {"Range": f"bytes={start}-{start + length - 1}"}
        self._connection.request("GET", self._target, headers=headers)
        response = self._connection.getresponse()
        data = response.read()
        if response.status == 206:
            return data
        if response.status == 403:
            raise Retry(f"the store at {self._where} refuses this URL; asking for a new one")
        raise http.client.HTTPException(f"status {response.status} where 206 was expected")
