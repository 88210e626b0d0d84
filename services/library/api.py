"""Serve the library over gRPC."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

from connito.bus import Bus
from connito.errors import Invalid
from connito.library.attestation import countersign
from connito.library.governance import Viewer
from connito.runtime.limits import RateLimit
from connito.service import rpc
from connito.service.oidc import Tokens
from connito.store import ArtifactStore
from connito.v1 import reasons_pb2, run_pb2, services_pb2, services_pb2_grpc
from connito.v1.envelope_pb2 import Envelope
from connito.wire.roster import OPERATOR, Roster
from connito.wire.subjects import LIBRARY

from .joining import Joining
from .state import NOTICES, Catalogue, summarise

NAME = services_pb2.DESCRIPTOR.services_by_name["LibraryService"].full_name
# Roles whose holders speak for the operator, who may say anything about any expert.
OPERATORS = ("library", "coordinator", OPERATOR)

_Read = (
    services_pb2.GetExpertRequest
    | services_pb2.ListExpertsRequest
    | services_pb2.SearchExpertsRequest
    | services_pb2.GetLedgerRequest
)


class Library(services_pb2_grpc.LibraryServiceServicer):
    """Reads what the viewer may see; statements and uses become facts of the log, and only then show."""

    def __init__(
        self,
        catalogue: Catalogue,
        store: ArtifactStore,
        bus: Bus,
        roster: Roster,
        current: Callable[[], Awaitable[None]],
        now_ms: Callable[[], int],
        limit: RateLimit,
        tokens: Tokens | None = None,
    ) -> None:
        self._joining = Joining(catalogue, store, bus)
        self._catalogue, self._store, self._bus, self._roster = catalogue, store, bus, roster
        self._current, self._now_ms, self._limit, self._tokens = current, now_ms, limit, tokens

    async def GetExpert(  # noqa: N802 - the name in the proto
        self, request: services_pb2.GetExpertRequest, context: Any
    ) -> services_pb2.GetExpertResponse:
        """Return one expert with its record. `NotFound` for an unknown id, `Retry` when the store is away."""
        fact = self._catalogue.fact(request.expert_id, await self._viewer(request, context))
        standing = self._catalogue.index.standing(request.expert_id)
        expert, attestation = summarise(fact, standing, self._catalogue.index.record(request.expert_id)), ""
        record = await self._store.get_bytes(expert.record)
        envelope = self._catalogue.envelopes.get(request.expert_id)
        if fact.message.HasField("attestation") and envelope is not None:
            part = json.loads(await self._store.get_bytes(fact.message.attestation))
            attestation = json.dumps(countersign(part, *envelope), sort_keys=True)
        return services_pb2.GetExpertResponse(
            expert=expert,
            record_json=record.decode(),
            attestation_json=attestation,
            status=standing.status,
            reason=standing.reason,
        )

    async def ListExperts(  # noqa: N802
        self, request: services_pb2.ListExpertsRequest, context: Any
    ) -> services_pb2.ListExpertsResponse:
        """Return a page of experts in the order of their deposit. `Invalid` for a foreign page token."""
        experts, token = self._catalogue.page(
            request.page_size, request.page_token, await self._viewer(request, context)
        )
        return services_pb2.ListExpertsResponse(experts=experts, next_page_token=token)

    async def SearchExperts(  # noqa: N802
        self, request: services_pb2.SearchExpertsRequest, context: Any
    ) -> services_pb2.SearchExpertsResponse:
        """Return a page of experts by words and domain, best first. `Invalid` for a foreign page token."""
        hits, token = self._catalogue.search(request, await self._viewer(request, context))
        return services_pb2.SearchExpertsResponse(hits=hits, next_page_token=token)

    async def DepositExpert(  # noqa: N802
        self, request: services_pb2.DepositExpertRequest, context: Any
    ) -> services_pb2.DepositExpertResponse:
        """Take in what a customer made of experts that are here. Raises `Invalid`, `Retry`."""
        command, signer = rpc.open_request(request.envelope, "rpc.DepositExpert", services_pb2.DepositExpertCommand)
        rpc.check_fresh(request.envelope, self._now_ms())
        self._limit.take(signer)
        if not self._roster.permits("customer", signer):
            raise Invalid(
                f"{signer} is no customer of this platform, and only a customer deposits",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )
        await self._current()
        viewer = Viewer(signer, self._roster.memberships(signer))
        message = await self._joining.take(command, request.envelope, viewer)
        await self._current()
        return services_pb2.DepositExpertResponse(expert=self._catalogue.get(message.expert_id, viewer))

    async def MarkExpert(  # noqa: N802
        self, request: services_pb2.MarkExpertRequest, context: Any
    ) -> services_pb2.MarkExpertResponse:
        """Write a notice into the log. Its owner may, and the operator. Raises `Invalid`, `NotFound`."""
        command, signer = rpc.open_request(request.envelope, "rpc.MarkExpert", services_pb2.MarkExpertCommand)
        rpc.check_fresh(request.envelope, self._now_ms())
        self._limit.take(signer)
        if command.kind not in NOTICES or not command.reason.strip():
            raise Invalid("a status and a reason are required")
        await self._current()
        of_source = command.kind in (run_pb2.NOTICE_KIND_OPTED_OUT, run_pb2.NOTICE_KIND_OPTED_IN)
        if not of_source and command.subject not in self._catalogue.facts:
            self._catalogue.get(command.subject)
        allowed = self._catalogue.may_state(signer, command.kind, command.subject)
        if not allowed and not any(self._roster.permits(role, signer) for role in OPERATORS):
            raise Invalid(
                f"{command.subject} is not yours to speak about: its owner or the operator may",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )
        run = LIBRARY if of_source else self._catalogue.facts[command.subject].run
        notice = run_pb2.ExpertNotice(
            run=run,
            id=_id(request.envelope),
            subject=command.subject,
            kind=command.kind,
            reason=command.reason,
            by=signer,
        )
        await self._bus.publish_fact(run, "library", 0, "notice", notice, notice.id)
        return services_pb2.MarkExpertResponse()

    async def MeterUse(  # noqa: N802
        self, request: services_pb2.MeterUseRequest, context: Any
    ) -> services_pb2.MeterUseResponse:
        """Write a use into the log, once however often it is sent. Raises `Invalid`, `NotFound`."""
        command, signer = rpc.open_request(request.envelope, "rpc.MeterUse", services_pb2.MeterUseCommand)
        rpc.check_fresh(request.envelope, self._now_ms())
        self._limit.take(signer)
        if not any(signer in members for members in self._roster.keys.values()):
            raise Invalid(f"{signer} is not in the operator's roster", reason=reasons_pb2.REASON_NOT_PERMITTED)
        if not command.verb or not 1 <= command.units <= 1_000_000:
            raise Invalid("a use has a verb and 1 to 1,000,000 units")
        await self._current()
        expert = self._catalogue.get(command.expert_id, Viewer(signer, self._roster.memberships(signer)))
        used = run_pb2.ExpertUsed(
            run=expert.run,
            id=_id(request.envelope),
            expert_id=expert.expert_id,
            verb=command.verb,
            units=command.units,
            by=signer,
        )
        await self._bus.publish_fact(expert.run, "library", 0, "used", used, used.id)
        return services_pb2.MeterUseResponse()

    async def GetLedger(  # noqa: N802
        self, request: services_pb2.GetLedgerRequest, context: Any
    ) -> services_pb2.GetLedgerResponse:
        """Return uses of an expert and whom they are credited to. `NotFound` for an unknown id."""
        return self._catalogue.ledger(request.expert_id, await self._viewer(request, context))

    async def _viewer(self, request: _Read, context: Any) -> Viewer:
        """Return who a provider vouches for, or who signed the request, or nobody, once the catalogue is level with the log."""
        if self._tokens is not None and (vouched := await self._tokens.bearer(rpc.authorization(context))):
            await self._current()
            return vouched
        signer = ""
        if request.HasField("viewer"):
            _, signer = rpc.open_request(request.viewer, "rpc.ReadLibrary", services_pb2.ReadLibraryCommand)
            rpc.check_fresh(request.viewer, self._now_ms())
        await self._current()
        return Viewer(signer, self._roster.memberships(signer)) if signer else Viewer()


def _id(envelope: Envelope) -> str:
    return hashlib.sha256(envelope.SerializeToString()).hexdigest()[:40]
