"""The coordinator's API. Any replica may serve it: a mutation is a fact, and the broker admits a fact once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from connito.bus import Bus
from connito.errors import Invalid, NotFound, Retry
from connito.facts import Log, RunFacts
from connito.roster import ROLES, Roster
from connito.rpc import open_request
from connito.v1 import reasons_pb2, run_pb2, services_pb2, services_pb2_grpc

from services.coordinator.changes import Changes
from services.coordinator.spec import complete
from services.coordinator.status import status, version

NAME = services_pb2.DESCRIPTOR.services_by_name["RunService"].full_name
# How long a mutation waits to see its own fact in this replica's projection.
SEE_SECONDS = 5.0
MAX_LABEL = 80


class RunApi(services_pb2_grpc.RunServiceServicer):
    """`connito.v1.RunService`. Errors are raised as `connito.errors` and mapped by `connito.rpc`."""

    def __init__(self, bus: Bus, log: Log, roster: Roster, changes: Changes) -> None:
        self._bus, self._log, self._roster, self._changes = bus, log, roster, changes

    async def CreateRun(self, request: services_pb2.CreateRunRequest, context: Any) -> services_pb2.CreateRunResponse:  # noqa: N802
        """Create a run; again with the same spec is fine. Raises `Invalid` naming the field that is wrong."""
        asked, customer = open_request(request.envelope, "rpc.CreateRun", run_pb2.RunSpec, self._roster, "customer")
        spec = complete(asked, customer)
        await self._bus.publish_fact(spec.run, "run", 0, "created", run_pb2.RunCreated(spec=spec))
        facts = await self._wait(spec.run, lambda facts: facts.spec is not None)
        if facts.spec != spec:
            raise Invalid(
                f"run {spec.run!r} exists already and asks for something else; choose another run id",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )
        return services_pb2.CreateRunResponse(run=spec.run)

    async def GetRun(self, request: services_pb2.GetRunRequest, context: Any) -> services_pb2.GetRunResponse:  # noqa: N802
        """Where a run stands. Raises `NotFound`."""
        return services_pb2.GetRunResponse(status=status(self._known(request.run)))

    async def ListRuns(self, request: services_pb2.ListRunsRequest, context: Any) -> services_pb2.ListRunsResponse:  # noqa: N802
        """Every run, oldest first."""
        created = [(facts.fact("run", 0, "created"), facts) for facts in self._log.runs.values()]
        known = sorted((fact.sequence, facts.run) for fact, facts in created if fact is not None)
        return services_pb2.ListRunsResponse(runs=[status(self._log.runs[run]) for _, run in known])

    async def CancelRun(self, request: services_pb2.CancelRunRequest, context: Any) -> services_pb2.CancelRunResponse:  # noqa: N802
        """End a run now; again is fine. Only its own customer may. Raises `NotFound`, `Invalid`."""
        command, signer = open_request(
            request.envelope, "rpc.CancelRun", services_pb2.CancelRunCommand, self._roster, "customer"
        )
        facts = self._known(command.run)
        if facts.spec is None or facts.spec.customer != signer:
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
            raise _over(facts)
        return services_pb2.CancelRunResponse()

    async def WatchRun(  # noqa: N802
        self, request: services_pb2.WatchRunRequest, context: Any
    ) -> AsyncIterator[services_pb2.WatchRunResponse]:
        """The status now and whenever it changes, until the run has ended. Raises `NotFound`."""
        sent: services_pb2.RunStatus | None = None
        while True:
            changed = self._changes.of(request.run)
            facts = self._known(request.run)
            current = status(facts)
            if current != sent:
                yield services_pb2.WatchRunResponse(status=current)
                sent = current
            if facts.ended is not None:
                return
            await changed.wait()

    async def EnrolMiner(  # noqa: N802
        self, request: services_pb2.EnrolMinerRequest, context: Any
    ) -> services_pb2.EnrolMinerResponse:
        """Let the signer take part; again is fine. Raises `NotFound`, and `Invalid` for a run that has ended."""
        command, miner = open_request(request.envelope, "rpc.EnrolMiner", services_pb2.EnrolMinerCommand)
        self._check_enrolment(command, miner)
        facts = self._known(command.run)
        if not facts.has("run", 0, "miner", miner):
            if facts.ended is not None:
                raise _over(facts)
            enrolled = run_pb2.MinerEnrolled(run=command.run, miner=miner, label=command.label)
            await self._bus.publish_fact(command.run, "run", 0, "miner", enrolled, miner)
            facts = await self._wait(command.run, lambda facts: facts.has("run", 0, "miner", miner))
        if facts.ended is not None:
            raise _over(facts)
        return services_pb2.EnrolMinerResponse(spec=facts.spec)

    def _check_enrolment(self, command: services_pb2.EnrolMinerCommand, miner: str) -> None:
        if len(command.label) > MAX_LABEL or not command.label.isprintable():
            raise Invalid(f"label may have up to {MAX_LABEL} printable characters; shorten it")
        for role in ROLES:
            # Who judges, merges or keeps the books does not compete. A customer may.
            if role != "customer" and self._roster.permits(role, miner):
                raise Invalid(
                    f"this key is a {role}'s and cannot mine; make another with `connito miner init`",
                    reason=reasons_pb2.REASON_NOT_PERMITTED,
                )

    def _known(self, run: str) -> RunFacts:
        facts = self._log.runs.get(run)
        if facts is None or facts.spec is None:
            raise NotFound(
                f"no run is called {run!r}; `connito job list` shows them", reason=reasons_pb2.REASON_UNKNOWN_RUN
            )
        return facts

    async def _wait(self, run: str, satisfied: Callable[[RunFacts], bool]) -> RunFacts:
        """The facts of a run once they satisfy. Raises `Retry` when that takes unusually long."""
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


def _over(facts: RunFacts) -> Invalid:
    assert facts.ended is not None
    outcome = run_pb2.RunOutcome.Name(facts.ended.outcome).removeprefix("RUN_OUTCOME_").lower()
    return Invalid(
        f"run {facts.run!r} has ended ({outcome}); `connito job list` shows what is running",
        reason=reasons_pb2.REASON_WRONG_WINDOW,
    )
