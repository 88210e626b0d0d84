"""The committer's API: how a miner without bucket credentials writes one artifact and reads public ones."""

from __future__ import annotations

from typing import Any

from connito.bus import Bus
from connito.errors import ConnitoError, Invalid, NotFound
from connito.protocol import bans
from connito.runtime.limits import RateLimit
from connito.runtime.metrics import REFUSALS
from connito.service.rpc import open_request
from connito.store import ArtifactStore
from connito.v1 import reasons_pb2, services_pb2, services_pb2_grpc
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.views.sentences import sentence
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts

from . import judging
from .state import FACTS, State

NAME = services_pb2.DESCRIPTOR.services_by_name["SubmissionService"].full_name
DIGESTS_PER_REQUEST = 16


class SubmissionApi(services_pb2_grpc.SubmissionServiceServicer):
    """`connito.v1.SubmissionService`. Errors are raised as `connito.errors` and mapped by `connito.service.rpc`."""

    def __init__(self, bus: Bus, state: State, store: ArtifactStore, limit: RateLimit, presign_seconds: int) -> None:
        self._bus, self._state, self._store = bus, state, store
        self._limit, self._presign_seconds = limit, presign_seconds

    async def RequestUpload(  # noqa: N802
        self, request: services_pb2.RequestUploadRequest, context: Any
    ) -> services_pb2.RequestUploadResponse:
        """Return one write-once PUT for what the signer committed to. Raises `Invalid` with the reason, `NotFound`,
        `Retry`.
        """
        command, miner = open_request(request.envelope, "rpc.RequestUpload", services_pb2.UploadCommand)
        self._limit.take(miner)
        try:
            await self._permit_upload(miner, command)
        except Invalid as error:
            REFUSALS.labels(reason_name(error.reason)).inc()
            raise
        # What the object is called in the store follows from digest and realm alone.
        artifact = command.artifact
        if await self._store.stat(artifact) == artifact.size:
            return services_pb2.RequestUploadResponse(present=True)
        url, headers = self._store.presign_put(artifact, self._presign_seconds)
        return services_pb2.RequestUploadResponse(url=url, headers=headers)

    async def _permit_upload(self, miner: str, command: services_pb2.UploadCommand) -> None:
        try:
            judging.judge_upload(self._facts(command.run), miner, command)
        except Invalid:
            # The facts here may be a moment behind what the miner has already seen.
            await self._state.refresh(self._bus, FACTS)
            judging.judge_upload(self._facts(command.run), miner, command)

    async def RequestDownloads(  # noqa: N802
        self, request: services_pb2.RequestDownloadsRequest, context: Any
    ) -> services_pb2.RequestDownloadsResponse:
        """Return GETs for public artifacts, to an enrolled miner. Raises `NotFound` naming the digest that is not
        public.
        """
        command, miner = open_request(request.envelope, "rpc.RequestDownloads", services_pb2.DownloadsCommand)
        # A look at the store for each: asking for many at once is not cheaper than asking often.
        self._limit.take(miner, max(1.0, len(command.digests) / DIGESTS_PER_REQUEST))
        await self._permit_downloads(miner, command.run)
        urls = {digest: await self._public_url(digest) for digest in command.digests}
        return services_pb2.RequestDownloadsResponse(urls=urls)

    async def _permit_downloads(self, miner: str, run: str) -> None:
        try:
            self._check_enrolled(miner, run)
        except ConnitoError:
            await self._state.refresh(self._bus, ("RUNS",))
            self._check_enrolled(miner, run)

    def _check_enrolled(self, miner: str, run: str) -> None:
        ban = bans.standing(self._facts(run), miner)
        if ban is not None and not ban.lifted:
            raise Invalid(sentence(bans.refusal(ban).finding), reason=reasons_pb2.REASON_BANNED)
        if miner not in self._facts(run).enrolled:
            raise Invalid(
                f"you are not enrolled in run {run}; `connito miner run` enrols you",
                reason=reasons_pb2.REASON_NOT_ENROLLED,
            )

    async def _public_url(self, digest: str) -> str:
        """Return a URL for a key in the public realm only: held-out data and submissions have the same form of digest."""
        ref = ArtifactRef(digest=digest, realm=REALM_PUBLIC)
        if await self._store.stat(ref) is None:
            raise NotFound(
                f"no public artifact has the digest {digest[:80]}", reason=reasons_pb2.REASON_ARTIFACT_MISSING
            )
        return self._store.presign_get(ref, self._presign_seconds)

    def _facts(self, run: str) -> RunFacts:
        return judging.known_run(self._state.runs.get(run), run)
