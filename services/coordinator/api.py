"""The coordinator's API. Any replica may serve it: a mutation is a fact, and the broker admits a fact once."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

from connito.bus import Bus
from connito.errors import Invalid, Retry
from connito.protocol import bans, tenancy
from connito.protocol.findings import check_version
from connito.protocol.policy.check import complete
from connito.runtime.host import now_ms
from connito.runtime.limits import RateLimit
from connito.service.oidc import Tokens
from connito.service.rpc import check_fresh, open_request
from connito.v1 import reasons_pb2, run_pb2, services_pb2, services_pb2_grpc
from connito.v1.envelope_pb2 import Envelope
from connito.views.status import status, version
from connito.wire.bounds import check_bounds
from connito.wire.enums import plain_name
from connito.wire.facts import RunFacts
from connito.wire.identity import is_public_key
from connito.wire.roster import OPERATOR, Roster
from connito.wire.subjects import INSTALLATION
from connito.wire.verification import ENROL_SUBJECT

from . import enrolment
from .admission import Admission
from .reading import Readers, unknown
from .state import Changes, State

NAME = services_pb2.DESCRIPTOR.services_by_name["RunService"].full_name
# How long a mutation waits to see its own fact in this replica's projection.
SEE_SECONDS = 5.0
LOOK_SECONDS = 2.0
MAX_WHY = 500


class RunApi(services_pb2_grpc.RunServiceServicer):
    """`connito.v1.RunService`. Errors are raised as `connito.errors` and mapped by `connito.service.rpc`."""

    def __init__(
        self,
        bus: Bus,
        log: State,
        roster: Roster,
        changes: Changes,
        limit: RateLimit | None = None,
        clock: Callable[[], int] = now_ms,
        admission: Admission | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        self._bus, self._log, self._roster, self._changes, self._clock = bus, log, roster, changes, clock
        self._limit = limit or RateLimit(math.inf, math.inf, time.monotonic)
        self._admission = admission or Admission(None, "", roster)
        self._readers = Readers(log, roster, clock, tokens)

    async def CreateRun(self, request: services_pb2.CreateRunRequest, context: Any) -> services_pb2.CreateRunResponse:  # noqa: N802
        """Create a run; again with the same spec is fine. Raises `Invalid` naming the field that is wrong."""
        asked, customer = open_request(request.envelope, "rpc.CreateRun", run_pb2.RunSpec, self._roster, "customer")
        self._limit.take(customer)
        spec = complete(asked, customer, self._roster.memberships(customer))
        await self._log.refresh(self._bus, ("RUNS",))
        self._log.naming.check(spec, self._log.runs)
        tenancy.check_submission(spec, customer, self._roster, self._log.runs)
        await self._bus.publish_fact(
            spec.run, "run", 0, "created", run_pb2.RunCreated(spec=spec, order=request.envelope)
        )
        facts = await self._wait(spec.run, lambda facts: facts.spec is not None)
        if facts.spec != spec:
            raise Invalid(
                f"run {spec.run!r} exists already and asks for something else; choose another run id",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )
        return services_pb2.CreateRunResponse(run=spec.run)

    async def GetRun(self, request: services_pb2.GetRunRequest, context: Any) -> services_pb2.GetRunResponse:  # noqa: N802
        """Return the status of a run that is shown to the signer. Raises `NotFound`, `Invalid`."""
        facts = self._readers.run(request.run, await self._readers.viewer(request, context))
        return services_pb2.GetRunResponse(status=status(facts, self._clock(), self._roster.stake))

    async def ListRuns(self, request: services_pb2.ListRunsRequest, context: Any) -> services_pb2.ListRunsResponse:  # noqa: N802
        """Return every run that is shown to the signer, oldest first. Raises `Invalid`."""
        viewer, now = await self._readers.viewer(request, context), self._clock()
        created = [(facts.created_fact, facts) for facts in self._log.runs.values() if self._readers.may(facts, viewer)]
        known = sorted((fact.sequence, facts.run) for fact, facts in created if fact is not None)
        return services_pb2.ListRunsResponse(
            runs=[status(self._log.runs[run], now, self._roster.stake) for _, run in known]
        )

    async def CancelRun(self, request: services_pb2.CancelRunRequest, context: Any) -> services_pb2.CancelRunResponse:  # noqa: N802
        """End a run now; again is fine. Its customer may, and an owner of its organisation. Raises `NotFound`, `Invalid`."""
        command, signer = open_request(
            request.envelope, "rpc.CancelRun", services_pb2.CancelRunCommand, self._roster, "customer"
        )
        facts = self._known(command.run)
        if not tenancy.may_cancel(facts.require_spec(), signer, self._roster):
            self._readers.run(command.run, self._readers.by_key(signer))
            raise Invalid(f"run {command.run!r} belongs to another customer", reason=reasons_pb2.REASON_NOT_PERMITTED)
        if facts.ended is None:
            ended = run_pb2.RunEnded(
                run=command.run,
                outcome=run_pb2.RUN_OUTCOME_CANCELLED,
                reason=reasons_pb2.REASON_CANCELLED,
                detail=command.detail[:1000] or "cancelled by the customer",
                final_version=version(facts),
            )
            await self._bus.publish_fact(command.run, "run", 0, "ended", ended)
        facts = await self._wait(command.run, lambda facts: facts.ended is not None)
        if facts.ended is not None and facts.ended.outcome != run_pb2.RUN_OUTCOME_CANCELLED:
            raise _over(facts, facts.ended)
        return services_pb2.CancelRunResponse()

    async def WatchRun(  # noqa: N802
        self, request: services_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[services_pb2.WatchRunResponse]:
        """Yield the status now and whenever it changes, until the run has ended. Raises `NotFound`, `Invalid`."""
        viewer = await self._readers.viewer(request, context)
        sent: services_pb2.RunStatus | None = None
        with self._readers.stream(viewer.name):
            # Nothing is kept about a name that no run has.
            self._readers.run(request.run, viewer)
            while True:
                changed = self._changes.of(request.run)
                facts = self._readers.run(request.run, viewer)
                current = status(facts, self._clock(), self._roster.stake)
                if current != sent:
                    yield services_pb2.WatchRunResponse(status=current)
                    sent = current
                if facts.ended is not None:
                    return
                # A pause begins with time, not with a fact.
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await changed.wait()

    async def EnrolMiner(  # noqa: N802
        self, request: services_pb2.EnrolMinerRequest, context: Any
    ) -> services_pb2.EnrolMinerResponse:
        """Let the signer take part; again is fine. Raises `NotFound`, and `Invalid` for a run that has ended or is
        under newer rules.
        """
        check_bounds(request)
        command, miner = open_request(request.envelope, ENROL_SUBJECT, services_pb2.EnrolMinerCommand)
        # Before anything is kept about a key: fresh ones cost nothing.
        enrolment.check_pass(request.admission, miner, self._roster)
        self._limit.take(miner)
        enrolment.check_label(command.label)
        enrolment.check_key(miner, self._roster)
        facts = self._known(command.run)
        if not enrolment.may_ask(facts, command, miner, self._roster, self._clock()):
            self._readers.run(command.run, self._readers.by_key(miner))
        check_version(facts.require_spec())
        enrolment.check_ban(facts, self._everywhere, miner)
        if not facts.is_enrolled(miner):
            if facts.ended is not None:
                raise _over(facts, facts.ended)
            await self._enrol(facts, command, miner, request.envelope)
            facts = await self._wait(command.run, lambda facts: facts.is_enrolled(miner))
        if facts.ended is not None:
            raise _over(facts, facts.ended)
        return services_pb2.EnrolMinerResponse(spec=facts.spec)

    async def AdmitMiner(  # noqa: N802
        self, request: services_pb2.AdmitMinerRequest, context: Any
    ) -> services_pb2.AdmitMinerResponse:
        """Return passes to the bus for one use of an invite; again is fine. Raises `Invalid`."""
        self._admission.knock(context.peer())
        command, miner = open_request(request.envelope, "rpc.AdmitMiner", services_pb2.AdmitMinerCommand)
        enrolment.check_key(miner, self._roster)
        invite = enrolment.admitting(command.invite, self._log.runs, self._roster, self._clock())
        enrolment.check_ban(self._log.runs.get(invite.run) or RunFacts(invite.run), self._everywhere, miner)
        await self._use(invite, miner)
        where = self._log.runs[invite.run or INSTALLATION]
        return self._admission.admit(miner, enrolment.used_at_ms(invite, where, miner))

    async def _enrol(
        self, facts: RunFacts, command: services_pb2.EnrolMinerCommand, miner: str, order: Envelope
    ) -> None:
        enrolled = run_pb2.MinerEnrolled(run=command.run, miner=miner, label=command.label, order=order)
        invite = enrolment.invite_for(facts, command, miner, self._roster, self._clock())
        if invite is not None:
            await self._use(invite, miner)
        await self._bus.publish_fact(command.run, "run", 0, "miner", enrolled, miner)

    async def _use(self, invite: run_pb2.Invite, miner: str) -> None:
        """Write down one use of an invite, the first number that is free. Raises `Invalid` when none is."""
        where = invite.run or INSTALLATION
        while (use := enrolment.free_use(invite, self._log.runs.get(where) or RunFacts(where), miner)) is not None:
            id_ = f"{use.invite}-{use.number}"
            await self._bus.publish_fact(where, "run", 0, "invited", use, id_)
            # Whose it became shows in the log; if it is another's, the next number is tried.
            await self._wait(where, lambda facts, id_=id_: id_ in facts.invites_used)  # type: ignore[misc]

    async def BanMiner(self, request: services_pb2.BanMinerRequest, context: Any) -> services_pb2.BanMinerResponse:  # noqa: N802
        """Shut a key out of a run or, on an operator's order, of every run; or take it back. Again is fine.

        Raises `NotFound` for an unknown run, and `Invalid` for somebody who may not order it.
        """
        order, signer = open_request(request.envelope, bans.ORDER_SUBJECT, run_pb2.BanOrder)
        self._limit.take(signer)
        # Orders stand in the log, where everybody reads them: an old one is no order any more.
        check_fresh(request.envelope, self._clock(), reasons_pb2.REASON_NOT_PERMITTED)
        if not is_public_key(order.miner):
            raise Invalid(f"{order.miner[:80]!r} is not a public key (U…); `connito status` shows miners' keys")
        if len(order.why) > MAX_WHY or not order.why.isprintable():
            raise Invalid(f"the reason may have up to {MAX_WHY} printable characters; shorten it")
        operator = self._roster.permits(OPERATOR, signer)
        spec = None if order.run == "" else self._known(order.run).spec
        customer = spec is not None and spec.customer == signer and self._roster.permits("customer", signer)
        if not operator and not (customer and not self._roster.only_reads(signer)):
            if order.run:
                self._readers.run(order.run, self._readers.by_key(signer))
            raise Invalid(
                f"{signer} is neither an operator in the roster nor this run's customer; ask one of them",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )
        # The place that new enrolments look at comes first: a key that is put out cannot slip into another run.
        where = [order.run] if order.run else [INSTALLATION, *self._going_on()]
        for run in where:
            await self._ban(run, order, request.envelope)
        return services_pb2.BanMinerResponse(runs=where)

    async def _ban(self, run: str, order: run_pb2.BanOrder, envelope: Envelope) -> None:
        """Write the order into one run's log, unless it holds there already."""
        while True:
            facts = self._log.runs.get(run) or RunFacts(run)
            last = bans.standing(facts, order.miner)
            if (last is None and order.lifted) or (last is not None and last.lifted == order.lifted):
                return
            if last is not None and last.order.issued_at_unix_ms >= envelope.issued_at_unix_ms:
                raise Invalid(
                    f"a later order about {order.miner} stands in run {run}; sign a new one",
                    reason=reasons_pb2.REASON_NOT_PERMITTED,
                )
            number = bans.number_after(facts, order.miner)
            ban = run_pb2.MinerBan(
                run=run, miner=order.miner, number=number, lifted=order.lifted, why=order.why, order=envelope
            )
            id_ = f"{order.miner}-{number}"
            await self._bus.publish_fact(run, "run", 0, "ban", ban, id_)
            await self._wait(run, lambda facts, id_=id_: id_ in facts.bans)  # type: ignore[misc]

    def _going_on(self) -> list[str]:
        runs = self._log.runs.values()
        return sorted(facts.run for facts in runs if facts.spec is not None and facts.ended is None)

    @property
    def _everywhere(self) -> RunFacts:
        return self._log.runs.get(INSTALLATION) or RunFacts(INSTALLATION)

    def _known(self, run: str) -> RunFacts:
        facts = self._log.runs.get(run)
        if facts is None or facts.spec is None:
            raise unknown(run)
        return facts

    async def _wait(self, run: str, satisfied: Callable[[RunFacts], bool]) -> RunFacts:
        """Return the facts of a run once they satisfy. Raises `Retry` when that takes unusually long."""
        try:
            async with asyncio.timeout(SEE_SECONDS):
                while True:
                    changed = self._changes.of(run)
                    facts = self._log.runs.get(run)
                    if facts is not None and satisfied(facts):
                        return facts
                    await changed.wait()
        except TimeoutError as error:
            raise Retry(
                f"what was written about run {run!r} did not come back from the broker yet; ask again"
            ) from error


def _over(facts: RunFacts, ended: run_pb2.RunEnded) -> Invalid:
    outcome = plain_name(run_pb2.RunOutcome, ended.outcome)
    return Invalid(
        f"run {facts.run!r} has ended ({outcome}); `connito job list` shows what is running",
        reason=reasons_pb2.REASON_WRONG_WINDOW,
    )
