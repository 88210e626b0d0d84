"""Select the experts of a run: fetch, compute inside the machine's budget, publish."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ParamSpec, TypeVar

from connito.bus import Bus
from connito.data.documents import parse_json
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import ConnitoError, Fatal, Invalid, ObjectDamaged, ObjectMissing
from connito.library.start import Shelved, deposits, notice_of, notices, wants_start
from connito.runtime import logs, metrics
from connito.runtime.compute import ComputeBudget
from connito.runtime.logs import Logger
from connito.runtime.waiting import here_and_now
from connito.store import ArtifactStore
from connito.v1 import reasons_pb2, run_pb2
from connito.wire import subjects
from connito.wire.fact import Record
from connito.wire.private import placed
from connito.wire.roster import Roster
from connito.wire.verification import verify_fact
from connito.workloads.fetching import BaseFiles, fetch_base, fetch_holdouts
from connito.workloads.selecting import Chosen, Library, Probes, check_corpora, choose

from . import handlers

P = ParamSpec("P")
R = TypeVar("R")


class Selector:
    """Handles `run.0.created`. Selecting again gives the same bytes, unless the library that a job starts from has grown
    in between, and the log admits one selection."""

    def __init__(self, bus: Bus, store: ArtifactStore, roster: Roster, budget: ComputeBudget, log: Logger) -> None:
        self._bus, self._store, self._roster, self._budget, self._log = bus, store, roster, budget, log

    async def handle(self, record: Record) -> None:
        """Publish the run's selection, or why there is none. Raises `Retry` when broker or store are away."""
        fact = verify_fact(record, self._roster)
        assert isinstance(fact.message, run_pb2.RunCreated)
        logs.bind_run(fact.run)
        decision = handlers.decide(fact.message.spec, await self._standing(fact.run))
        if isinstance(decision, handlers.Settled):
            self._log.info("nothing to select", because=decision.because)
            return
        try:
            message = await self._select(decision.spec)
        except Fatal:
            raise
        except Exception as error:
            # Nobody has looked at what the job names before: that it is not there is the job's mistake.
            if here_and_now(error) is not None and not isinstance(error, (ObjectMissing, ObjectDamaged)):
                raise
            await self.fail(record, error)
            return
        await self._bus.publish_fact(fact.run, "run", 0, "selected", message)
        self._log.info("selected", experts=message.selected_experts, of=message.total_experts)

    async def fail(self, record: Record, error: Exception) -> None:
        """Publish why there is no selection for a run."""
        failure = handlers.failed(verify_fact(record, self._roster).run, error)
        self._log.error("no selection is possible", error=failure.detail)
        await self._bus.publish_fact(failure.run, "run", 0, "selection_failed", failure)

    async def _standing(self, run: str) -> set[str]:
        """Return which kinds of `SETTLED` the run has a fact of. Forged messages on those subjects do not count."""
        records = {kind: await self._bus.last_record(subjects.fact(run, "run", 0, kind)) for kind in handlers.SETTLED}
        return {kind for kind, record in records.items() if record is not None and self._holds(record)}

    def _holds(self, record: Record) -> bool:
        try:
            verify_fact(record, self._roster)
        except Invalid:
            return False
        return True

    async def _select(self, spec: run_pb2.RunSpec) -> run_pb2.SelectionMade:
        if spec.secret.digest and await self._store.owner(spec.secret.digest) != spec.customer:
            raise Invalid("the run's secret is another customer's", reason=reasons_pb2.REASON_NOT_PERMITTED)
        base = await fetch_base(self._store, spec)
        probe = await self._store.fetch(spec.probe.artifact)
        probes = Probes(
            probe,
            await self._store.fetch(spec.replay.artifact) if spec.HasField("replay") else None,
            {corpus.domain: await self._store.fetch(corpus.artifact) for corpus in spec.beside},
        )
        await self._check_corpora(spec, base, probes)
        library = await self._library(spec) if wants_start(spec) else None
        with tempfile.TemporaryDirectory() as folder:
            theta = Path(folder) / "theta.safetensors"
            async with self._budget.slot("select"):
                began = time.monotonic()
                chosen = await asyncio.to_thread(_compute, spec, base, probes, theta, library)
                metrics.SELECTION_SECONDS.observe(time.monotonic() - began)
            return await self._store_all(spec, chosen, theta)

    async def _check_corpora(self, spec: run_pb2.RunSpec, base: BaseFiles, probes: Probes) -> None:
        read = [await self._store.fetch(spec.train.artifact), probes.target, *probes.beside.values()]
        read += [] if probes.replay is None else [probes.replay]
        held = await fetch_holdouts(self._store, spec, self._bus.identity)
        await asyncio.to_thread(_by_content, spec, check_corpora, spec, base.files, read, held)

    async def _library(self, spec: run_pb2.RunSpec) -> Library:
        """Return every expert of the run's base that is deposited by now."""
        facts, last = [], 0
        async for record in self._bus.stored(["LIBRARY"]):
            last = max(last, record.sequence)
            with suppress(Invalid):
                facts.append(verify_fact(record, self._roster))
        shelf, against = [], notices(facts, last)
        for deposit in deposits(facts, spec, last):
            record = parse_json(await self._store.get_bytes(deposit.record))
            notice = notice_of(record, deposit.expert_id, against)
            shelf.append(Shelved(deposit, record, await self._store.fetch(deposit.expert), notice))
        return Library(shelf, last)

    async def _store_all(self, spec: run_pb2.RunSpec, chosen: Chosen, theta: Path) -> run_pb2.SelectionMade:
        place = placed(spec)
        statistics = await self._store.put_bytes(chosen.statistics, SAFETENSORS, place)
        report = await self._store.put_bytes(chosen.report(statistics.digest), "application/json", place)
        signature = await self._store.put_bytes(chosen.signature_bytes(), "application/json", place)
        state = await self._store.put_file(theta, SAFETENSORS, place, cache=True)
        made = handlers.made(spec.run, chosen, report, state, signature)
        if chosen.background:
            made.background.CopyFrom(await self._store.put_bytes(chosen.background, SAFETENSORS, place))
        return made


def _compute(
    spec: run_pb2.RunSpec,
    base: BaseFiles,
    probes: Probes,
    theta: Path,
    library: Library | None = None,
) -> Chosen:
    return _by_content(spec, choose, spec, base.manifest, base.files, probes, theta, library)


def _by_content(spec: run_pb2.RunSpec, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `work`, turning errors of a hostile or broken base into a failed selection."""
    try:
        return work(*args, **kwargs)
    except ConnitoError:
        raise
    except Exception as error:
        if here_and_now(error) is not None:
            raise
        raise Invalid(
            f"the base model {spec.base.name} cannot read the run's text: {type(error).__name__}: {error}; check that "
            "the corpora were tokenised with this base's tokenizer"
        ) from error
