"""Scoring and merging a cycle: fetch, compute inside the machine's budget, publish."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from connito.base.loading import load_tokenizer
from connito.bus import Bus, offences
from connito.errors import Invalid, VerificationFailed
from connito.library.deposit_plan import Deposit, lacks_scores, plan
from connito.library.scores import MEASURING_SECONDS
from connito.protocol.merging.cycle import Merged, merge_cycle
from connito.protocol.merging.earlier import EarlierWork, earlier_works
from connito.protocol.merging.opened import Files
from connito.protocol.provenance import check_settled, check_start
from connito.protocol.rules import quorum_fault
from connito.protocol.scoring.consensus import Consensus
from connito.protocol.scoring.counted_reports import read_reports
from connito.protocol.scoring.verdicts import agree, no_quorum
from connito.runtime import metrics
from connito.runtime.compute import ComputeBudget, in_thread
from connito.runtime.logs import bind_run, get_logger
from connito.service.engine import Action
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import BenchmarksMeasured
from connito.views.sentences import detail_of, sentence
from connito.wire.enums import plain_name, reason_name
from connito.wire.facts import RunFacts
from connito.wire.roster import Roster
from connito.workloads.benchmarks import fetch_named, measure
from connito.workloads.fetching import fetch_base, fetch_holdouts
from connito.workloads.gating import GateEvaluator

from .handlers import Benchmark, Merge, Preload

log = get_logger("aggregator")


class Aggregator:
    """Performs what `handlers.decide` asks for. `facts(run)` are the engine's; `leading()`: may this replica publish?"""

    def __init__(
        self,
        bus: Bus,
        store: ArtifactStore,
        roster: Roster,
        budget: ComputeBudget,
        facts: Callable[[str], RunFacts],
        leading: Callable[[], bool],
        load: Callable[..., GateEvaluator] = GateEvaluator.load,
    ) -> None:
        self._bus, self._store, self._roster, self._budget = bus, store, roster, budget
        self._facts, self._leading, self._load_model = facts, leading, load
        self.evaluators: dict[str, GateEvaluator] = {}
        self._loading = asyncio.Lock()

    def forget(self, run: str) -> None:
        """Free a finished run's model."""
        self.evaluators.pop(run, None)

    async def perform(self, action: Action) -> None:
        """Perform an action. Raises `Retry` when broker or store are away."""
        match action.payload:
            case Preload(run):
                await self._preload(run)
            case Merge(run, cycle):
                bind_run(run, cycle)
                await self._merge(run, cycle)
            case Benchmark(run):
                await self._benchmark(run)

    async def _preload(self, run: str) -> None:
        """Load the model and measure the state that the next merge starts from."""
        facts = self._facts(run)
        evaluator = await self._evaluator(facts)
        opened = facts.window("train", max(facts.cycle, 1)).opened
        ref = facts.require_selection().initial_state if opened is None else opened.state
        state = await self._store.fetch(ref)
        async with evaluator.turn, self._budget.slot("gate"):
            await asyncio.to_thread(_measure_both, evaluator, ref.digest, state)
        log.info("the model is ready", run=run)

    async def _evaluator(self, facts: RunFacts) -> GateEvaluator:
        async with self._loading:
            if facts.run not in self.evaluators:
                self.evaluators[facts.run] = await self._load(facts)
            return self.evaluators[facts.run]

    async def _load(self, facts: RunFacts) -> GateEvaluator:
        spec, selection = facts.require_spec(), facts.require_selection()
        base, holdouts = (
            await fetch_base(self._store, spec),
            await fetch_holdouts(self._store, spec, self._bus.identity),
        )
        async with self._budget.slot("load"):
            return await asyncio.to_thread(self._load_model, spec, selection, base.files, holdouts)

    async def _merge(self, run: str, cycle: int) -> None:
        facts = self._facts(run)
        if facts.version(cycle) is not None:
            return
        window = facts.window("submit", cycle)
        window.require_settled()
        try:
            check_start(facts, cycle)
            check_settled(facts, cycle)
        except VerificationFailed as error:
            offences.report("wrong_settlement", subject=f"{run}.submit.{cycle}.settled", detail=str(error))
            raise
        submissions = window.submissions
        agreed = self._agree(facts, cycle, submissions)
        evaluator = await self._evaluator(facts)
        with tempfile.TemporaryDirectory(prefix="connito-merge-") as folder:
            files = await self._fetch(facts, cycle, submissions)
            work = partial(merge_cycle, facts, cycle, submissions, agreed, {}, files, evaluator.measure, Path(folder))
            async with evaluator.turn, self._budget.slot("merge"):
                merged = await asyncio.to_thread(work)
            await self._publish(run, cycle, merged)

    async def _benchmark(self, run: str) -> None:
        """Score base and result on the benchmarks and tasks of a run; then its model is needed no more. What computes for a run
        that goes on comes first.
        """
        facts = self._facts(run)
        spec, ended, due = facts.require_spec(), facts.ended_fact, plan(facts)
        assert ended is not None
        assert isinstance(due, Deposit), "decided on these facts"
        left = ended.time_unix_ms / 1000 + MEASURING_SECONDS - await self._bus.time()
        until = self._bus.host.monotonic() + left
        files = await fetch_named(self._store, spec, self._bus.identity)
        state, base = await self._store.fetch(due.state), await fetch_base(self._store, spec)
        evaluator = await self._evaluator(facts)
        async with evaluator.turn, self._budget.slot("gate") as give_way:

            def work(stop: threading.Event) -> BenchmarksMeasured:
                def between() -> None:
                    give_way(stop.is_set)
                    if stop.is_set() or self._bus.host.monotonic() > until:
                        raise Invalid(f"it was not scored within {MEASURING_SECONDS / 3600:g} hours of the run's end")

                tokenizer = load_tokenizer(base.files) if spec.tasks else None
                return measure(evaluator.evaluator, tokenizer, spec, files, due.state.digest, state, between)

            scores = await in_thread(work)
        if self._leading() and lacks_scores(self._facts(run)):
            await self._bus.publish_fact(run, "library", 0, "benchmarked", scores)
        self.forget(run)

    def _agree(self, facts: RunFacts, cycle: int, submissions: Sequence[cycle_pb2.Submission]) -> Consensus:
        reports = read_reports(facts, cycle)
        for validator, why in reports.ignored.items():
            log.warning("a report does not count", validator=validator, why=sentence(why.finding))
        fault = quorum_fault(facts, cycle, reports, self._roster.stake)
        if fault is not None:
            log.error("no quorum", why=sentence(fault))
            return no_quorum(facts, cycle, submissions, fault)
        return agree(facts, cycle, reports, submissions, self._roster.stake)

    async def _fetch(self, facts: RunFacts, cycle: int, submissions: Sequence[cycle_pb2.Submission]) -> Files:
        """Fetch the files that a merge needs. What the committer accepted is waited for, however long it is gone."""
        opened, previous = facts.window("train", cycle).require_opened(), facts.version(cycle - 1)
        wanted = {opened.state.digest: opened.state}
        if previous is not None:
            wanted[previous.outer_state.digest] = previous.outer_state
        before = earlier_works(facts, cycle)
        for entry in (*before, *submissions):
            base = entry.base_state if entry.base_state.digest else opened.state
            wanted |= {entry.artifact.digest: entry.artifact, base.digest: base}
        found = await asyncio.gather(*map(self._store.fetch, wanted.values()))
        path = dict(zip(wanted, found, strict=True))
        return Files(
            path[opened.state.digest],
            None if previous is None else path[previous.outer_state.digest],
            {entry.miner: path[entry.artifact.digest] for entry in submissions},
            {entry.miner: path[entry.base_state.digest or opened.state.digest] for entry in submissions},
            [EarlierWork(one, path[one.artifact.digest], path[one.base_state.digest]) for one in before],
        )

    async def _publish(self, run: str, cycle: int, merged: Merged) -> None:
        """Store the artifacts, then publish the version, so that a version in the log can be fetched."""
        if not self._leading():
            # Whoever leads now makes the same version out of the same facts.
            return
        version = merged.version
        made = [(merged.state, version.state), (merged.momentum, version.outer_state)]
        if merged.step is not None:
            made.append((merged.step, version.step))
        await asyncio.gather(*(self._store.put_file(path, ref.media_type, cache=True, known=ref) for path, ref in made))
        await self._bus.publish_fact(run, "merge", cycle, "scored", merged.scored)
        if await self._bus.publish_fact(run, "merge", cycle, "version", merged.version):
            _report(run, merged)


def _measure_both(evaluator: GateEvaluator, digest: str, state: Path) -> None:
    evaluator.measure("gate", digest, state)
    evaluator.measure("report", digest, state)


def disagreement(scored: cycle_pb2.CycleScored) -> float:
    """Return the largest distance of a validator from consensus, relative to the best agreed utility; at most 1."""
    best = max((verdict.utility for verdict in scored.verdicts), default=0.0)
    farthest = max((standing.deviation for standing in scored.validators), default=0.0)
    return min(1.0, farthest / best) if best > 0.0 else float(farthest > 0.0)


def _report(run: str, merged: Merged) -> None:
    """Record metrics and one log line for a version that was written."""
    version = merged.version
    gate = plain_name(cycle_pb2.GateDecision, version.gate).replace("-", "_")
    metrics.GATE_DECISIONS.labels(gate).inc()
    for verdict in merged.scored.verdicts:
        status = plain_name(cycle_pb2.VerdictStatus, verdict.status)
        metrics.SUBMISSIONS.labels(status, reason_name(verdict.reason)).inc()
    metrics.VALIDATOR_DISAGREEMENT.set(disagreement(merged.scored))
    for standing in merged.scored.validators:
        if merged.scored.bonded or standing.trust:
            metrics.VALIDATOR_TRUST.labels(run, standing.validator).set(standing.trust)
        if standing.reason:
            log.warning(
                "a validator loses weight",
                validator=standing.validator,
                reason=reason_name(standing.reason),
                detail=detail_of(standing),
                trust=round(standing.trust, 4),
            )
    losses = list(version.losses)
    if losses:
        metrics.TARGET_LOSS.labels(run).set(losses[0].after)
    if losses[1:]:
        metrics.GENERAL_LOSS.labels(run).set(sum(loss.after for loss in losses[1:]) / len(losses[1:]))
    log.info(
        "version published",
        version=version.version,
        gate=gate,
        detail=detail_of(version),
        merged=len(version.merged),
        target_loss=round(losses[0].after, 4) if losses else None,
    )
