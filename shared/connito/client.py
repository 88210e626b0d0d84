"""`connito.Client`: jobs and the library from a script, without asyncio."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from google.protobuf.message import Message

from connito.errors import Invalid, NotFound, Retry
from connito.v1 import run_pb2, services_pb2
from connito.v1.run_pb2 import BanOrder, RunSpec
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.tls import PLAIN, Tls

if TYPE_CHECKING:
    from connito.jobs.check import Checked
    from connito.jobs.quote import Quote
    from connito.library.governance import Standing
    from connito.library.hits import Hit

DEADLINE_SECONDS = 10.0


class Client:
    """A connection to a platform's APIs.

    Reading needs addresses only; creating and cancelling runs needs the key of a customer in the operator's roster.
    Every method raises `Retry` when the service is away, `NotFound` and `Invalid` as the service says.
    """

    def __init__(self, coordinator: str, library: str = "", identity: Identity | None = None, tls: Tls = PLAIN) -> None:
        """`coordinator` and `library` are `host:port`; `tls` says how they are spoken to."""

        from connito.v1 import services_pb2_grpc

        self._identity = identity
        self._data_dir: Path | None = None
        self._tls, self._coordinator = tls, coordinator
        self._channels = [_channel(coordinator, tls)]
        self._run_service = services_pb2_grpc.RunServiceStub(self._channels[0])
        if library:
            self._channels.append(_channel(library, tls))
            self._library = services_pb2_grpc.LibraryServiceStub(self._channels[1])

    @classmethod
    def local(cls, data_dir: Path | str | None = None, role: str = "customer") -> Self:
        """A client, as the customer or another `role`, of the platform that `connito up` runs on this machine, or of
        the one that CONNITO_NATS_URL names, with the key in CONNITO_KEY_FILE."""
        import asyncio

        from connito.platform.session import Session

        folder = None if data_dir is None else Path(data_dir)
        session = Session.open(folder, role=role)
        addresses = asyncio.run(session.endpoints("coordinator", "library"))
        client = cls(addresses["coordinator"], addresses["library"], session.identity, session.tls)
        client._data_dir = folder
        return client

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def create_run(self, spec: RunSpec) -> str:
        """Submit a job; returns the run's id. Raises `Invalid` naming the field that cannot be."""
        request = services_pb2.CreateRunRequest(envelope=self._seal("rpc.CreateRun", spec))
        return str(self._call(self._run_service.CreateRun, request).run)

    def check_job(self, file: Path | str) -> Checked:
        """What `connito job check` finds out about a job.yaml; `.ok`, `.findings`. Raises as that command does."""
        from connito.jobs.check import check_file

        return check_file(Path(file), self._data_dir)

    def quote_job(self, file: Path | str, *, pilot: bool = True) -> Quote:
        """What a job.yaml will take. Raises `Invalid` for one that cannot be submitted. Imports torch."""
        from connito.jobs.quote import quote

        return quote(self.check_job(file), pilot=pilot)

    def submit_job(self, file: Path | str) -> str:
        """Check a job.yaml, upload its corpora, create its run; returns the run's id."""
        from connito.jobs.submit import submit

        return submit(self.check_job(file), self.create_run).run

    def report_job(self, run: str, out: Path | str | None = None, *, measure: bool = True) -> dict[str, Any]:
        """The delivery report of a run that has ended, as `job report --json` prints it; with `out`, written there too."""
        from connito.jobs.delivery import deliver, write
        from connito.platform.session import Session

        delivered = deliver(Session.open(self._data_dir, role="customer"), run, measure=measure)
        if out is not None:
            write(delivered, Path(out))
        return delivered.document

    def get(self, run: str) -> services_pb2.RunStatus:
        """Where a run stands. Raises `NotFound` for an unknown one."""
        answer = self._call(self._run_service.GetRun, services_pb2.GetRunRequest(run=run))
        return cast(services_pb2.RunStatus, answer.status)

    def runs(self) -> list[services_pb2.RunStatus]:
        """Every run."""
        return [*self._call(self._run_service.ListRuns, services_pb2.ListRunsRequest()).runs]

    def watch(self, run: str) -> Iterator[services_pb2.RunStatus]:
        """The run's status whenever it changes, until it has ended."""
        import grpc

        from connito.service.rpc import error_of

        try:
            for answer in self._run_service.WatchRun(services_pb2.WatchRunRequest(run=run)):
                yield answer.status
        except grpc.RpcError as error:
            raise error_of(cast(Any, error)) from error

    def cancel(self, run: str, detail: str = "cancelled by the customer") -> None:
        """End a run early. What it has published stays."""
        command = services_pb2.CancelRunCommand(run=run, detail=detail)
        self._call(
            self._run_service.CancelRun, services_pb2.CancelRunRequest(envelope=self._seal("rpc.CancelRun", command))
        )

    def ban(self, miner: str, why: str, run: str = "", *, lifted: bool = False) -> list[str]:
        """Shut a key out of one run or, as an operator, of every run; or take that back. The runs it stands in.

        Raises `NotFound` for an unknown run, `Invalid` when this key may not order it.
        """
        order = BanOrder(run=run, miner=miner, lifted=lifted, why=why)
        request = services_pb2.BanMinerRequest(envelope=self._seal("rpc.BanMiner", order))
        return [*self._call(self._run_service.BanMiner, request).runs]

    def experts(self) -> list[services_pb2.ExpertSummary]:
        """Everything in the library that this client's identity may see, in the order of deposit."""
        found: list[services_pb2.ExpertSummary] = []
        token = ""
        while True:
            request = services_pb2.ListExpertsRequest(page_size=100, page_token=token, viewer=self._viewer())
            page = self._call(self._library.ListExperts, request)
            found += page.experts
            token = page.next_page_token
            if not token:
                return found

    def search(self, text: str = "", *, domain: str = "", everything: bool = False, limit: int = 20) -> list[Hit]:
        """Experts by words and domain, best first, as `connito.library.hits.search` ranks them."""
        from connito.library.governance import Standing
        from connito.library.hits import Hit

        found: list[Hit] = []
        request = services_pb2.SearchExpertsRequest(
            text=text, domain=domain, everything=everything, page_size=min(limit, 100), viewer=self._viewer()
        )
        while len(found) < limit:
            page = self._call(self._library.SearchExperts, request)
            for hit in page.hits:
                expert, saving = hit.expert, hit.saving if hit.HasField("saving") else None
                standing = Standing(hit.status, hit.reason)
                found.append(Hit(expert.expert_id, expert.domain, hit.license, saving, hit.score, standing, {}))
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
        return found[:limit]

    def expert(self, expert_id: str) -> tuple[services_pb2.ExpertSummary, dict[str, Any]]:
        """One expert and its record. Raises `NotFound` for an unknown id."""
        answer = self._expert(expert_id)
        return answer.expert, json.loads(answer.record_json)

    def attestation(self, expert_id: str) -> str:
        """The signatures behind an expert, JSON for `attestation.json`; empty for deposits older than they are."""
        return str(self._expert(expert_id).attestation_json)

    def standing(self, expert_id: str) -> Standing:
        """What the library says about an expert now."""
        from connito.library.governance import Standing

        answer = self._expert(expert_id)
        return Standing(answer.status or "good", answer.reason)

    def mark(self, subject: str, status: str, reason: str) -> bool:
        """Deprecate, yank or restore an expert, or opt a data source out or in. False where the library has no such expert.

        Raises `Invalid` for what is not the client's own to speak about.
        """
        try:
            kind = run_pb2.NoticeKind.Value(f"NOTICE_KIND_{status.upper().replace('-', '_')}")
        except ValueError as error:
            raise Invalid(
                f"an expert cannot be {status!r}; say deprecated, yanked, restored, opted-out or opted-in"
            ) from error
        command = services_pb2.MarkExpertCommand(subject=subject, kind=kind, reason=reason)
        try:
            self._call(
                self._library.MarkExpert, services_pb2.MarkExpertRequest(envelope=self._seal("rpc.MarkExpert", command))
            )
        except NotFound:
            return False
        return True

    def meter(self, expert_id: str, verb: str, units: int = 1) -> None:
        """Write one use down. Raises `NotFound` for an unknown id."""
        command = services_pb2.MeterUseCommand(expert_id=expert_id, verb=verb, units=units)
        self._call(self._library.MeterUse, services_pb2.MeterUseRequest(envelope=self._seal("rpc.MeterUse", command)))

    def ledger(self, expert_id: str) -> dict[str, Any]:
        """Uses of an expert by verb, and whom they are credited to. Raises `NotFound`."""
        request = services_pb2.GetLedgerRequest(expert_id=expert_id, viewer=self._viewer())
        answer = self._call(self._library.GetLedger, request)
        return {"uses": dict(answer.uses), "credited": dict(answer.credited), "uncredited": int(answer.uncredited)}

    def _expert(self, expert_id: str) -> services_pb2.GetExpertResponse:
        request = services_pb2.GetExpertRequest(expert_id=expert_id, viewer=self._viewer())
        return cast(services_pb2.GetExpertResponse, self._call(self._library.GetExpert, request))

    def _viewer(self) -> Any:
        """Who reads, signed; nothing without a key, which sees what is public."""
        if self._identity is None:
            return None
        return seal(self._identity, "rpc.ReadLibrary", services_pb2.ReadLibraryCommand(purpose="read"))

    def _seal(self, subject: str, message: Message) -> Any:
        if self._identity is None:
            raise Invalid("this needs a customer's key: pass `identity=Identity.load(path)`")
        return seal(self._identity, subject, message)

    def _call(self, method: Callable[..., Any], request: Message) -> Any:
        import grpc

        from connito.service.rpc import error_of

        try:
            return method(request, timeout=DEADLINE_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            found = error_of(cast(Any, error))
            certificate = self._tls.diagnose(self._coordinator) if isinstance(found, Retry) else None
            raise certificate or found from error


def _channel(address: str, tls: Tls) -> Any:
    import grpc

    options = [("grpc.enable_http_proxy", 0)]
    if tls.api == "off":
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(address, tls.channel_credentials(), options=options)
