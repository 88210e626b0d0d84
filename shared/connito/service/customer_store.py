"""Artifacts for a customer, who holds no credentials of the store: each is asked for, and comes or goes by a signed address."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any, Protocol

from google.protobuf.message import Message

from connito.errors import Invalid
from connito.service import rpc
from connito.store import ArtifactStore, get_presigned, put_presigned, ref_of_file
from connito.store.cache import Cache, digest_of_file
from connito.v1 import reasons_pb2, services_pb2, services_pb2_grpc
from connito.v1.artifacts_pb2 import REALM_PRIVATE, REALM_PUBLIC, ArtifactRef, Realm
from connito.v1.envelope_pb2 import Envelope
from connito.wire import private
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.sealing import MEDIA_TYPE, seal_file
from connito.wire.tls import Tls


class Reachable(Protocol):
    """A platform as a customer reaches it: `connito.platform.session.Session`."""

    @property
    def identity(self) -> Identity: ...

    @property
    def roster(self) -> Roster: ...

    @property
    def tls(self) -> Tls: ...

    @property
    def cache_dir(self) -> Path: ...

    async def endpoints(self, *names: str) -> dict[str, str]: ...

    def direct(self) -> ArtifactStore | None: ...


class CustomerStore:
    """Uploads are for any run of the customer's, downloads because of one. Raises what the committer and the store raise."""

    def __init__(self, platform: Reachable) -> None:
        self._platform, self.cache = platform, Cache(platform.cache_dir)
        self._address = ""
        self._secrets: dict[str, bytes] = {}

    async def stat(self, ref: ArtifactRef) -> int | None:
        """Return the size of an artifact that is there already, or None if it has to be uploaded."""
        return ref.size if (await self._slot(ref)).present else None

    async def secret(self, what: str) -> ArtifactRef:
        """Upload this customer's secret for a run, or for an expert that it made, sealed for those who work with it."""
        me = self._platform.identity
        with tempfile.TemporaryDirectory() as folder:
            (plain := Path(folder) / "secret").write_bytes(private.secret_of(me, what))
            seal_file(plain, sealed := Path(folder) / "sealed", me, private.readers(self._platform.roster, me.public))
            ref = await self.put_file(sealed, MEDIA_TYPE)
        self._secrets[ref.digest] = private.secret_of(me, what)
        return ref

    async def put_file(
        self, path: Path, media_type: str, place: Realm.ValueType | ArtifactRef = REALM_PUBLIC, *, cache: bool = False
    ) -> ArtifactRef:
        """Upload a file unless it is there. `cache`: also put it into the local cache. `place`: a realm, or
        `wire.private.at` what `secret` returned.
        """
        ref = await asyncio.to_thread(ref_of_file, path, media_type, place)
        with tempfile.TemporaryDirectory() as folder:
            sent, digest = await asyncio.to_thread(self._encrypted, path, ref, Path(folder))
            slot = await self._slot(ref, digest)
            if not slot.present:
                await put_presigned(slot.url, slot.headers, sent)
        if cache:
            await asyncio.to_thread(self.cache.adopt, path, ref)
        return ref

    def _encrypted(self, path: Path, ref: ArtifactRef, folder: Path) -> tuple[Path, str]:
        """Return the file to send, and its SHA-256 where it is not the content's."""
        if ref.realm != REALM_PRIVATE:
            return path, ""
        sent, key = folder / "sent", private.key_of_content(self._secrets[ref.secret], ref.digest)
        with path.open("rb") as content, sent.open("wb") as out:
            shutil.copyfileobj(private.closed(content, ref.secret, key), out, 1 << 20)
        return sent, digest_of_file(sent)[0]

    async def put_bytes(
        self, data: bytes, media_type: str, place: Realm.ValueType | ArtifactRef = REALM_PUBLIC
    ) -> ArtifactRef:
        """Upload bytes unless they are there."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(data)
            file.flush()
            return await self.put_file(Path(file.name), media_type, place)

    async def fetch(self, ref: ArtifactRef, run: str) -> Path:
        """Return an artifact that a run entitles the customer to, as a verified file in the local cache."""
        if (store := self._platform.direct()) is not None:
            return await store.fetch(ref)
        loop = asyncio.get_running_loop()

        async def get(target: Path) -> None:
            command = services_pb2.DownloadsCommand(run=run, digests=[ref.digest])
            request = services_pb2.RequestDownloadsRequest(envelope=self._seal("RequestDownloads", command))
            answer = await self._call("RequestDownloads", request)
            key = private.unboxed(answer.keys[ref.digest], self._platform.identity)
            await get_presigned(answer.urls[ref.digest], ref, target, key=key)

        def download(target: Path) -> None:
            asyncio.run_coroutine_threadsafe(get(target), loop).result()

        return await asyncio.to_thread(self.cache.get, ref, download)

    async def _slot(self, ref: ArtifactRef, sent: str = "") -> services_pb2.RequestUploadResponse:
        command = services_pb2.UploadCommand(artifact=ref, sent=sent)
        request = services_pb2.RequestUploadRequest(envelope=self._seal("RequestUpload", command))
        answer: services_pb2.RequestUploadResponse = await self._call("RequestUpload", request)
        return answer

    def _seal(self, method: str, command: Message) -> Envelope:
        return seal(self._platform.identity, f"rpc.{method}", command)

    async def _call(self, method: str, request: Message) -> Any:
        self._address = self._address or (await self._platform.endpoints("committer"))["committer"]
        channel = rpc.channel(self._address, self._platform.tls)
        try:
            stub = services_pb2_grpc.SubmissionServiceStub(channel)
            while True:
                try:
                    return await rpc.call(getattr(stub, method), request)
                except Invalid as error:
                    if error.reason != reasons_pb2.REASON_QUOTA_EXCEEDED or not error.after:
                        raise
                    await asyncio.sleep(error.after)
        finally:
            await channel.close(None)
