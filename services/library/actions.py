"""Deposit the experts of runs that have ended, and read the catalogue of those that are deposited."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import aclosing, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from connito.bus import Bus, CaughtUp, offences
from connito.data.documents import parse_json
from connito.errors import Environment, Fatal, Invalid, Retry
from connito.library.artifact import MEDIA_TYPE, tensor_sizes, write_expert
from connito.library.attestation import attest
from connito.library.attestation import encode as encode_attestation
from connito.library.card import render
from connito.library.deposit_plan import STREAMS, Deposit, lacks_scores, plan
from connito.library.record import CARD_MEDIA_TYPE, RECORD_MEDIA_TYPE, build_record, encode
from connito.library.schema import ExpertRecord
from connito.library.scores import SCORES_IN, SCORING_SECONDS, benchmark_key, ends_wait
from connito.library.start import start_ref
from connito.protocol.findings import check_version
from connito.runtime import metrics
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import LONGEST, WAITING, delay, here_and_now
from connito.service.pausing import MAX_DETAIL
from connito.store import ArtifactStore
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.reasons_pb2 import REASON_FAULT
from connito.wire import subjects
from connito.wire.bounds import cut
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.private import placed
from connito.wire.roster import Roster
from connito.wire.subjects import run_of
from connito.wire.verification import verify_fact

from .state import Catalogue

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

# How long a reader waits for the catalogue to come level with the log.
CURRENT_SECONDS = 5.0


class Depositor:
    """Handles `run.0.ended`. Doing it twice writes the same bytes, and the log admits the deposit once."""

    def __init__(self, bus: Bus, store: ArtifactStore, roster: Roster, log: FilteringBoundLogger) -> None:
        self._bus, self._store, self._roster, self._log = bus, store, roster, log
        # By run, what ends when its scores are there, or late.
        self._awaited: dict[str, asyncio.Task[None]] = {}

    async def work(self) -> None:
        """Handle what ends until cancelled."""
        try:
            await self._bus.consume("library", self.handle, aside=self.tell)
        finally:
            await end_tasks(self._awaited.values())

    async def handle(self, record: Record) -> None:
        """Deposit the run's expert, if it has one, or say in the log that it cannot be. Raises `Invalid` for a run under newer
        rules, `Retry` when broker or store are away.
        """
        try:
            await self._handle(record)
        except Invalid as error:
            if not isinstance(error, Environment):
                await self.tell(record, error)
            raise

    async def _handle(self, record: Record) -> None:
        fact = verify_fact(record, self._roster)
        awaited = self._awaited.get(fact.run)
        if awaited is not None and not awaited.done():
            raise _unscored(fact.run)
        facts = await self._read_run(fact.run)
        if facts.spec is not None:
            check_version(facts.spec)
        if lacks_scores(facts):
            facts = await self._scored_or_late(facts, fact)
        decision = plan(facts)
        if not isinstance(decision, Deposit):
            self._log.info("nothing to deposit", run=fact.run, why=decision.why)
            self._awaited.pop(fact.run, None)
            return
        message = await self._deposit(facts, decision)
        if await self._bus.publish_fact(fact.run, "library", 0, "deposited", message, message.expert_id):
            metrics.EXPERTS_DEPOSITED.inc()
            self._log.info("expert deposited", run=fact.run, expert=message.expert_id, bytes=message.expert.size)
        self._awaited.pop(fact.run, None)

    async def _scored_or_late(self, facts: RunFacts, ended: Fact) -> RunFacts:
        """Raise `Retry` while scores may come. Once they are late, say so in the log, which the record follows, and return what
        it says by then.
        """
        run = facts.run
        left = ended.time_unix_ms / 1000 + SCORING_SECONDS - await self._bus.time()
        if left > 0:
            self._awaited[run] = asyncio.create_task(self._scored(run, left))
            raise _unscored(run)
        late = Invalid(f"no aggregator scored it within {SCORING_SECONDS / 3600:g} hours", reason=REASON_FAULT)
        await self._say(run, benchmark_key(run), late)
        return await self._read_run(run)

    async def _scored(self, run: str, seconds: float) -> None:
        """Return when the log has scores of a run or that there will be none, and after so long in any case. Keeps nothing of
        what it reads.
        """
        with suppress(TimeoutError, Retry, Invalid):
            async with asyncio.timeout(seconds), aclosing(self._bus.follow(SCORES_IN, run)) as items:
                async for item in items:
                    if not isinstance(item, CaughtUp) and ends_wait(item, self._roster):
                        return

    async def tell(self, record: Record, error: Invalid) -> None:
        """Say in the log that the deposit of a run is put aside, and why."""
        await self._say(verify_fact(record, self._roster).run, "deposit", error)

    async def _say(self, run: str, action: str, error: Invalid) -> None:
        notice = run_pb2.RunPaused(
            run=run,
            key=self._bus.identity.public,
            service="library",
            action=action,
            reason=error.reason,
            detail=cut(str(error), MAX_DETAIL),
        )
        await self._bus.publish_fact(run, "run", 0, "paused", notice, notice.key)

    async def _read_run(self, run: str) -> RunFacts:
        """Return all facts of a run. `run.0.ended` is written last, so what is stored now is everything."""
        log = Log(self._roster)
        async for record in self._bus.stored(STREAMS, run):
            try:
                log.apply(record)
            except Invalid as error:
                offences.ignore(record, error, new=False)
        return log.runs.get(run, RunFacts(run))

    async def _deposit(self, facts: RunFacts, decision: Deposit) -> run_pb2.ExpertDeposited:
        place = placed(facts.require_spec())
        state = await self._store.fetch(decision.state)
        report = parse_json(await self._store.get_bytes(facts.require_selection().report))
        header = decision.with_base(report.get("base", {}))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "expert.safetensors"
            digest = await asyncio.to_thread(write_expert, state, path, header)
            size = path.stat().st_size
            expert = await self._store.put_file(path, MEDIA_TYPE, place)
        signature = None
        if facts.require_selection().HasField("signature"):
            signature = parse_json(await self._store.get_bytes(facts.require_selection().signature))
        started = start_ref(facts.require_selection())
        parent = None if started is None else parse_json(await self._store.get_bytes(started))
        record = build_record(facts, digest, size, tensor_sizes(state)[0], signature, parent)
        message = await self._describe(record, expert, place)
        subject = subjects.fact(facts.run, "merge", decision.cycle, "version")
        version = await self._bus.last_record(subject)
        assert version is not None, "the run's facts hold this version"
        attestation = encode_attestation(attest(subject, version.data, state))
        message.attestation.CopyFrom(await self._store.put_bytes(attestation, "application/json", place))
        return message

    async def _describe(self, record: ExpertRecord, expert: ArtifactRef, place: ArtifactRef) -> run_pb2.ExpertDeposited:
        """Store card and record; the record names the card, so that whoever has one has both."""
        card = await self._store.put_bytes(render(record).encode(), CARD_MEDIA_TYPE, place)
        record["card"] = {"digest": card.digest, "bytes": card.size}
        ref = await self._store.put_bytes(encode(record), RECORD_MEDIA_TYPE, place)
        return run_pb2.ExpertDeposited(
            run=record["run"],
            expert_id=record["expert_id"],
            expert=expert,
            record=ref,
            domain=record["domain"],
            base_digest=record["base"]["manifest"],
            parents=[record["started_from"]["expert_id"]] if "started_from" in record else [],
        )


def _unscored(run: str) -> Retry:
    return Retry(f"run {run} is not scored on its benchmarks yet", after=LONGEST, dependency="aggregator")


class CatalogueReader:
    """Follows the library's stream into the catalogue. `complete` is set once everything stored by now is in it, and
    `current` waits for what the log has since: who has read of a deposit there finds it here.
    """

    def __init__(
        self, bus: Bus, store: ArtifactStore, roster: Roster, catalogue: Catalogue, log: FilteringBoundLogger
    ) -> None:
        self._bus, self._store, self._roster, self._catalogue, self._log = bus, store, roster, catalogue, log
        self.complete = asyncio.Event()
        self._position, self._moved = 0, asyncio.Condition()
        self._late: list[asyncio.Task[None]] = []

    async def current(self) -> None:
        """Return when all that the log holds now is in the catalogue; after a while, or without a broker, in any case."""
        with suppress(Retry, TimeoutError):
            async with asyncio.timeout(CURRENT_SECONDS):
                last = await self._bus.last_sequence("LIBRARY")
                async with self._moved:
                    await self._moved.wait_for(lambda: self._position >= last)

    async def follow(self) -> None:
        """Read until cancelled."""
        try:
            await self._follow()
        finally:
            await end_tasks(self._late)

    async def _follow(self) -> None:
        async for item in self._bus.follow(["LIBRARY"]):
            if isinstance(item, CaughtUp):
                self.complete.set()
                continue
            try:
                await self._add(item)
            except Fatal:
                raise
            except Exception as error:
                if (fault := here_and_now(error)) is not None:
                    # What one expert's record waits for keeps no other from the shelf.
                    self._log.warning("an entry is read later", subject=item.subject, error=str(fault))
                    self._late.append(asyncio.create_task(self._add_later(item)))
                elif isinstance(error, Invalid):
                    offences.ignore(item, error, new=self.complete.is_set())
                else:
                    # What one run's expert says of itself keeps no other from the shelf.
                    self._log.error("an entry cannot be read", subject=item.subject, exc_info=error)
            async with self._moved:
                self._position = item.sequence
                self._moved.notify_all()

    async def _add(self, item: Record) -> None:
        fact = verify_fact(item, self._roster)
        self._catalogue.add(fact, await self._record(fact), (item.subject, item.data))

    async def _add_later(self, item: Record) -> None:
        for tries in count():
            await asyncio.sleep(delay(1.0, tries))
            try:
                await self._add(item)
            except Exception as error:
                if (fault := here_and_now(error)) is not None:
                    WAITING.begin(item.subject, fault, run_of(item.subject), LONGEST)
                    continue
                self._log.error("an entry cannot be read", subject=item.subject, exc_info=error)
            WAITING.end(item.subject)
            return

    async def _record(self, fact: Fact) -> bytes | None:
        """Fetch the record of a deposit, however long the store is away. None where a kept index has it, or none is due."""
        deposit = fact.message
        if not isinstance(deposit, run_pb2.ExpertDeposited) or self._catalogue.index.lookup(deposit.expert_id):
            return None
        while True:
            try:
                return await self._store.get_bytes(deposit.record)
            except Retry as error:
                self._log.warning("the store is away", expert=deposit.expert_id, error=str(error))
                await asyncio.sleep(error.after or 1.0)
