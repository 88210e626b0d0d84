"""The library service of a platform. `connito.library` has the verbs that also use a shelf and the disk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from connito.client.connection import Connection
from connito.errors import Invalid
from connito.library.attestation import DEPOSIT_SUBJECT
from connito.library.schema import read_record
from connito.v1 import run_pb2, services_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.services_pb2 import ExpertSummary
from connito.views.notebook import Expert, Rows

if TYPE_CHECKING:
    from connito.library.governance import Standing
    from connito.library.hits import Hit

PAGE = 100


class Library:
    """The platform's library, as far as the client's identity may see it. Raises as `Client` says."""

    def __init__(self, connection: Connection) -> None:
        """Use `connection`, which signs with the identity whose rights apply."""
        self._connection = connection

    def reach(self) -> None:
        """Find the service. Raises `Retry` when it is away."""
        self._connection.reach("library")

    def list(self) -> Sequence[ExpertSummary]:
        """Return every expert in the order of deposit."""
        found = Rows[ExpertSummary]()
        request = services_pb2.ListExpertsRequest(page_size=PAGE, viewer=self._connection.viewer())
        while True:
            page = self._call("ListExperts", request)
            found += page.experts
            request.page_token = page.next_page_token
            if not page.next_page_token:
                return found

    def search(self, text: str = "", *, domain: str = "", everything: bool = False, limit: int = 20) -> Sequence[Hit]:
        """Find experts by words and domain, best first, as `connito.library.hits.search` ranks them. Raises `Invalid`."""
        from connito.library.governance import Standing
        from connito.library.hits import Hit

        if limit < 1:
            raise Invalid(f"limit is {limit}; ask for 1 or more experts")
        found: list[Hit] = []
        request = services_pb2.SearchExpertsRequest(
            text=text,
            domain=domain,
            everything=everything,
            page_size=min(limit, PAGE),
            viewer=self._connection.viewer(),
        )
        while len(found) < limit:
            page = self._call("SearchExperts", request)
            for hit in page.hits:
                expert, saving = hit.expert, hit.saving if hit.HasField("saving") else None
                standing = Standing(hit.status, hit.reason)
                found.append(Hit(expert.expert_id, expert.domain, hit.license, saving, hit.score, standing, {}))
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        return Rows(found[:limit])

    def show(self, expert_id: str) -> Expert:
        """Return one expert and its record. Raises `NotFound` for an unknown id."""
        answer = self._get(expert_id)
        return Expert(answer.expert, read_record(answer.record_json, expert_id))

    def attestation(self, expert_id: str) -> str:
        """Return the signatures behind an expert, JSON for `attestation.json`; empty for deposits older than they are."""
        return str(self._get(expert_id).attestation_json)

    def standing(self, expert_id: str) -> Standing:
        """Return what the library says about an expert now."""
        from connito.library.governance import Standing

        answer = self._get(expert_id)
        return Standing(answer.status or "good", answer.reason)

    def deposit(self, expert: ArtifactRef, record: ArtifactRef, files: Sequence[ArtifactRef] = ()) -> ExpertSummary:
        """Bring in what was made of the library's experts and uploaded before. Raises `Invalid` where it does not follow
        from them."""
        command = services_pb2.DepositExpertCommand(expert=expert, record=record, files=files)
        sealed = self._connection.seal(DEPOSIT_SUBJECT, command)
        answer = self._call("DepositExpert", services_pb2.DepositExpertRequest(envelope=sealed))
        found: ExpertSummary = answer.expert
        return found

    def mark(self, subject: str, status: str, reason: str) -> None:
        """Deprecate, yank or restore an expert, or opt a data source out or in. Raises `NotFound` for an unknown
        expert, `Invalid` for what is not the client's own to speak about."""
        try:
            kind = run_pb2.NoticeKind.Value(f"NOTICE_KIND_{status.upper().replace('-', '_')}")
        except ValueError as error:
            raise Invalid(
                f"an expert cannot be {status!r}; say deprecated, yanked, restored, opted-out or opted-in"
            ) from error
        command = services_pb2.MarkExpertCommand(subject=subject, kind=kind, reason=reason)
        sealed = self._connection.seal("rpc.MarkExpert", command)
        self._call("MarkExpert", services_pb2.MarkExpertRequest(envelope=sealed))

    def meter(self, expert_id: str, verb: str, units: int = 1) -> None:
        """Write one use down. Raises `NotFound` for an unknown id."""
        command = services_pb2.MeterUseCommand(expert_id=expert_id, verb=verb, units=units)
        sealed = self._connection.seal("rpc.MeterUse", command)
        self._call("MeterUse", services_pb2.MeterUseRequest(envelope=sealed))

    def ledger(self, expert_id: str) -> dict[str, Any]:
        """Return the uses of an expert by verb, and whom they are credited to. Raises `NotFound`."""
        request = services_pb2.GetLedgerRequest(expert_id=expert_id, viewer=self._connection.viewer())
        answer = self._call("GetLedger", request)
        return {"uses": dict(answer.uses), "credited": dict(answer.credited), "uncredited": int(answer.uncredited)}

    def _get(self, expert_id: str) -> services_pb2.GetExpertResponse:
        request = services_pb2.GetExpertRequest(expert_id=expert_id, viewer=self._connection.viewer())
        answer: services_pb2.GetExpertResponse = self._call("GetExpert", request)
        return answer

    def _call(self, method: str, request: Any) -> Any:
        return self._connection.call("library", method, request)
