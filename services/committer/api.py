"""The committer's API: how a miner without bucket credentials writes one artifact and reads what its run entitles it to."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from typing import Any

from connito.bus import Bus
from connito.errors import Invalid, NotFound, ObjectMissing, VerificationFailed
from connito.runtime.limits import RateLimit
from connito.runtime.metrics import REFUSALS
from connito.service.rpc import check_fresh, open_request
from connito.store import ArtifactStore
from connito.v1 import reasons_pb2, services_pb2, services_pb2_grpc
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, REALM_PRIVATE, REALM_PUBLIC, ArtifactRef
from connito.v1.envelope_pb2 import Envelope
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts
from connito.wire.hashing import is_digest
from connito.wire.sealing import NoKey
from connito.wire.subjects import LIBRARY

from . import judging
from .downloads import Downloads
from .state import FACTS, NAMING, State

NAME = services_pb2.DESCRIPTOR.services_by_name["SubmissionService"].full_name
DIGESTS_PER_REQUEST = 16
# Uploads of which an address was asked for.
REMEMBERED = 100_000
# Two clocks that are half an hour off, one each way, are let through.
RECENT_MS = 7_200_000
# No file of a base is larger; a length that a header cannot hold is none.
MAX_OBJECT = 1 << 40


class SubmissionApi(services_pb2_grpc.SubmissionServiceServicer):
    """`connito.v1.SubmissionService`. Errors are raised as `connito.errors` and mapped by `connito.service.rpc`."""

    def __init__(self, bus: Bus, state: State, store: ArtifactStore, limit: RateLimit, presign_seconds: int) -> None:
        self._bus, self._state, self._store = bus, state, store
        self._limit, self._presign_seconds = limit, presign_seconds
        self._downloads = Downloads(state, store)
        self._asked: OrderedDict[str, None] = OrderedDict()

    async def RequestUpload(  # noqa: N802
        self, request: services_pb2.RequestUploadRequest, context: Any
    ) -> services_pb2.RequestUploadResponse:
        """Return one write-once PUT for what the signer committed to. Raises `Invalid` with the reason, `NotFound`,
        `Retry`.
        """
        command, miner = open_request(request.envelope, "rpc.RequestUpload", services_pb2.UploadCommand)
        self._check_recent(request.envelope)
        self._limit.take(miner)
        try:
            await (self._permit_upload(miner, command) if command.run else self._permit_corpus(miner, command))
        except Invalid as error:
            REFUSALS.labels(reason_name(error.reason)).inc()
            raise
        # What the object is called in the store follows from digest and realm alone.
        artifact = command.artifact
        if self._may_be_there(command) and await self._store.stat(artifact) == artifact.size:
            return services_pb2.RequestUploadResponse(present=True)
        url, headers = self._store.presign_put(artifact, self._presign_seconds, command.sent)
        return services_pb2.RequestUploadResponse(url=url, headers=headers)

    def _may_be_there(self, command: services_pb2.UploadCommand) -> bool:
        """Return whether the store is asked before an address is given: not for a submission that nobody has asked to upload.
        What is there all the same is not stored twice, and its miner is told so then.
        """
        again = command.artifact.digest in self._asked
        self._asked[command.artifact.digest] = None
        if len(self._asked) > REMEMBERED:
            self._asked.popitem(last=False)
        return again or not command.run

    def _check_recent(self, envelope: Envelope) -> None:
        """Raise `Invalid` for a request signed hours ago: whoever overheard it gets no addresses with it for ever, and a miner
        whose clock is off gets its own all the same.
        """
        check_fresh(envelope, self._bus.host.now_ms(), reasons_pb2.REASON_NOT_PERMITTED, RECENT_MS)

    async def _permit_upload(self, miner: str, command: services_pb2.UploadCommand) -> None:
        try:
            judging.judge_upload(self._facts(command.run), miner, command)
        except Invalid:
            # The facts here may be a moment behind what the miner has already seen.
            await self._state.refresh(self._bus, FACTS)
            judging.judge_upload(self._facts(command.run), miner, command)

    async def _permit_corpus(self, customer: str, command: services_pb2.UploadCommand) -> None:
        """Let a customer upload what a run of its own may name. The address is good for these bytes alone, whoever asks."""
        realms = (REALM_PUBLIC, REALM_HOLDOUT, REALM_PRIVATE)
        allowed = command.artifact.realm in realms and 0 < command.artifact.size <= MAX_OBJECT
        roster = self._state.roster
        allowed = allowed and roster.permits("customer", customer) and not roster.only_reads(customer)
        if allowed and command.artifact.realm == REALM_PRIVATE:
            allowed = is_digest(command.sent) and await self._store.is_owner(command.artifact.secret, customer)
        if not allowed:
            raise Invalid(
                "an upload that belongs to no run is a customer's, of text or a base",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )

    async def RequestDownloads(  # noqa: N802
        self, request: services_pb2.RequestDownloadsRequest, context: Any
    ) -> services_pb2.RequestDownloadsResponse:
        """Return GETs for what a run entitles the signer to: an enrolled miner, or its customer. Raises `NotFound` naming
        the digest that it does not.
        """
        command, signer = open_request(request.envelope, "rpc.RequestDownloads", services_pb2.DownloadsCommand)
        self._check_recent(request.envelope)
        # A look at the store for each: asking for many at once is not cheaper than asking often.
        self._limit.take(signer, max(1.0, len(command.digests) / DIGESTS_PER_REQUEST))
        refs = await self._entitled(signer, command)
        urls = {digest: await self._url(refs.get(digest), digest, command.run) for digest in command.digests}
        keys: dict[str, bytes] = {}
        for ref in (refs[digest] for digest in urls):
            # Of what was sealed for others there is an address and no key: it costs what is asked for beside it nothing.
            with suppress(NoKey, ObjectMissing, VerificationFailed):
                if ref.realm == REALM_PRIVATE and await self._is_of(ref, command.run):
                    keys[ref.digest] = await self._store.boxed_key(ref, signer)
        return services_pb2.RequestDownloadsResponse(urls=urls, keys=keys)

    async def _is_of(self, ref: ArtifactRef, run: str) -> bool:
        """Return whether an artifact is encrypted under a secret of who brought it. Everybody knows the digests of others'
        compositions, and a run can name them and their secret; what services name beside, and deposits, they have checked.
        """
        spec = self._naming_facts(run).spec
        if spec is None or ref.secret != spec.secret.digest:
            return True
        return await self._store.is_owner(ref.secret, spec.customer)

    async def _entitled(self, signer: str, command: services_pb2.DownloadsCommand) -> dict[str, ArtifactRef]:
        try:
            refs = await self._downloads.entitled(self._naming_facts(command.run), signer)
            if set(command.digests) <= set(refs):
                return refs
        except (Invalid, NotFound):
            pass
        # The facts here may be a moment behind what the signer has already seen.
        await self._state.refresh(self._bus, NAMING)
        return await self._downloads.entitled(self._naming_facts(command.run), signer)

    async def _url(self, ref: ArtifactRef | None, digest: str, run: str) -> str:
        if ref is None:
            raise NotFound(f"run {run} gives you no artifact {digest[:80]}", reason=reasons_pb2.REASON_ARTIFACT_MISSING)
        if await self._store.stat(ref) is None:
            raise ObjectMissing(f"the store has no {digest}, which run {run} needs; restore it from a copy")
        return self._store.presign_get(ref, self._presign_seconds)

    def _naming_facts(self, run: str) -> RunFacts:
        return self._state.runs.get(run, RunFacts(run)) if run == LIBRARY else self._facts(run)

    def _facts(self, run: str) -> RunFacts:
        return judging.known_run(self._state.runs.get(run), run)
