"""Performing what the validator decided."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from connito.bus import Bus, offences
from connito.errors import Invalid, NotFound, Retry, VerificationFailed
from connito.protocol.assignment import assigned
from connito.protocol.beacon import secret_digest
from connito.protocol.findings import OF_THE_FILE
from connito.protocol.scoring.evaluation import Evaluation, fit, rejected, score
from connito.runtime import logs, metrics
from connito.runtime.compute import ComputeBudget, in_thread
from connito.service.engine import Action
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.sentences import as_recorded, detail_of
from connito.wire.chain import Chains, anchored_windows
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.workloads.fetching import fetch_base, fetch_holdouts
from connito.workloads.scoring import SubmissionEvaluator, SubmissionFiles

from .handlers import CommitSeed, Join, Preload, RevealSeed, Score, Unload, check_draw
from .settings import ValidatorSettings

log = logs.get_logger("validator")

Files = dict[str, SubmissionFiles | Invalid]


class Validator:
    """The dependencies of a validator's actions. `loaded` are the runs whose model is in memory."""

    def __init__(
        self,
        bus: Bus,
        store: ArtifactStore,
        compute: ComputeBudget,
        settings: ValidatorSettings,
        facts: Callable[[str], RunFacts],
        anchors: Callable[[str, int], list[cycle_pb2.WindowAnchor]] = lambda run, cycle: [],
        load: Callable[..., SubmissionEvaluator] = SubmissionEvaluator.load,
    ) -> None:
        self._bus, self._store, self._compute, self._settings, self._facts = bus, store, compute, settings, facts
        self._anchors, self._load_model = anchors, load
        self._evaluators: dict[str, SubmissionEvaluator] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._measuring = asyncio.Lock()
        self.secret = secret_of(bus.identity)

    @property
    def me(self) -> str:
        """Return this validator's public key."""
        return self._bus.identity.public

    @property
    def loaded(self) -> set[str]:
        """Return the runs whose model is in memory."""
        return set(self._evaluators)

    async def perform(self, action: Action) -> None:
        """Do one thing. Raises `Retry` and `Invalid` as the engine understands them."""
        run = action.run
        match action.payload:
            case Join():
                await self._bus.publish_fact(
                    run, "run", 0, "validator", run_pb2.ValidatorJoined(run=run, validator=self.me), self.me
                )
            case Preload():
                await self._evaluator(run)
            case Unload():
                self._evaluators.pop(run, None)
            case CommitSeed(cycle):
                digest = secret_digest(run, cycle, self.me, self.secret(run, cycle))
                message = cycle_pb2.SeedCommitted(
                    run=run, cycle=cycle, validator=self.me, digest=digest, anchors=self._anchors(run, cycle)
                )
                await self._bus.publish_fact(run, "train", cycle, "seed", message, self.me)
            case RevealSeed(cycle):
                secret = self.secret(run, cycle)
                revealed = cycle_pb2.SeedRevealed(run=run, cycle=cycle, validator=self.me, secret=secret)
                await self._bus.publish_fact(run, "validate", cycle, "seed", revealed, self.me)
            case Score(cycle):
                logs.bind_run(run, cycle)
                await self._score(run, cycle)

    async def _evaluator(self, run: str) -> SubmissionEvaluator:
        """Return the run's model and hold-outs, loaded once."""
        async with self._loading.setdefault(run, asyncio.Lock()):
            if run not in self._evaluators:
                self._evaluators[run] = await self._load(run)
            return self._evaluators[run]

    async def _load(self, run: str) -> SubmissionEvaluator:
        facts, begun = self._facts(run), self._bus.host.monotonic()
        spec, selection = facts.require_spec(), facts.require_selection()
        base, holdouts = await fetch_base(self._store, spec), await fetch_holdouts(self._store, spec)
        settings = self._settings
        load = partial(
            self._load_model, spec, selection, base.files, holdouts,
            device=settings.device, threads=settings.torch_threads, batch_tokens=settings.batch_tokens,
            cache_bytes=settings.hidden_cache_bytes,
        )  # fmt: skip
        async with self._compute.slot("load"):
            evaluator = await asyncio.to_thread(load)
        log.info("model loaded", seconds=round(self._bus.host.monotonic() - begun, 2))
        return evaluator

    async def _score(self, run: str, cycle: int) -> None:
        facts = self._facts(run)
        try:
            seed = check_draw(facts, cycle)
        except VerificationFailed as error:
            offences.report("wrong_draw", subject=f"{run}.validate.{cycle}.drawn", detail=str(error))
            log.error("the draw does not verify", security=True, error=str(error))
            raise
        opened, settled = facts.window("train", cycle).require_opened(), facts.window("submit", cycle).require_settled()
        state = await self._store.fetch(opened.state)
        duties = assigned(facts, cycle)
        submissions = [entry for entry in settled.submissions if duties is None or entry.miner in duties[self.me]]
        fetched = await asyncio.gather(*(self._fetch(item, opened.state) for item in submissions))
        files: Files = {item.miner: result for item, result in zip(submissions, fetched, strict=True)}
        evaluator = await self._evaluator(run)
        async with self._measuring, self._compute.slot("score"):
            report = await in_thread(
                lambda stop: self._measure(facts, evaluator, cycle, seed, state, submissions, files, stop)
            )
        report.state_digest = opened.state.digest
        as_recorded(report, facts.spec)
        if left_out := fit(report):
            log.warning("the report is large: per-sequence losses are left out", submissions=left_out)
        await self._bus.publish_fact(run, "validate", cycle, "report", report, self.me)
        log.info(
            "reported", submissions=len(submissions), of=len(settled.submissions), seconds=round(report.seconds, 2)
        )

    async def _fetch(self, submission: cycle_pb2.Submission, current: ArtifactRef) -> SubmissionFiles | Invalid:
        """Return the submission's files, or why there are none. Raises `Retry` for what is not the submission's fault."""
        try:
            artifact = await self._store.fetch(submission.artifact)
        except (NotFound, VerificationFailed) as error:
            reason = (
                reasons_pb2.REASON_ARTIFACT_MISSING
                if isinstance(error, NotFound)
                else reasons_pb2.REASON_DIGEST_MISMATCH
            )
            return Invalid(str(error), reason=reason)
        except Invalid as error:
            raise Retry(f"cannot read the submissions: {error}", after=5.0) from error
        origin = submission.base_state
        if origin.digest in ("", current.digest):
            return SubmissionFiles(artifact, None)
        return SubmissionFiles(artifact, await self._store.fetch(origin))

    def _measure(
        self,
        facts: RunFacts,
        evaluator: SubmissionEvaluator,
        cycle: int,
        seed: bytes,
        state: Path,
        submissions: Sequence[cycle_pb2.Submission],
        files: Files,
        stop: threading.Event,
    ) -> cycle_pb2.ScoreReport:
        """Score the submissions against the incumbent, one after the other, on the drawn sequences."""
        begun = self._bus.host.monotonic()
        report = cycle_pb2.ScoreReport(run=facts.run, cycle=cycle, validator=self.me, seed=seed)
        drawn = evaluator.draw(seed)
        before = evaluator.incumbent(state, drawn, stop)
        for submission in submissions:
            with metrics.SCORE_SECONDS.time():
                found = files[submission.miner]
                try:
                    if isinstance(found, Invalid):
                        raise found
                    measurable = evaluator.submission(state, found, drawn, before, stop, submission.miner)
                    item = score(
                        submission,
                        Evaluation(drawn, measurable, facts.require_spec().holdout.domain),
                        facts.require_spec(),
                    )
                except Invalid as error:
                    if error.reason not in OF_THE_FILE:
                        raise
                    item = rejected(submission, error)
            report.scores.append(item)
            reason = reason_name(item.reason)
            metrics.SUBMISSIONS.labels("rejected" if reason else "useful", reason).inc()
            log.info(
                "scored",
                miner=submission.miner,
                utility=round(item.utility, 5),
                reason=reason,
                detail=detail_of(item),
                sequences=len(item.losses),
            )
        report.seconds = self._bus.host.monotonic() - begun
        return report


def anchors_of(chains: Chains, cycle: int) -> list[cycle_pb2.WindowAnchor]:
    """Return the digests of earlier windows that this validator signs with its commitment, as far as it has read them."""
    known = ((window, chains.heads.get(window)) for window in anchored_windows(cycle))
    return [
        cycle_pb2.WindowAnchor(window=window, last_sequence=head[0], head=head[1])
        for window, head in known
        if head is not None
    ]


def secret_of(identity: Identity) -> Callable[[str, int], bytes]:
    """Return the beacon secret of each run and cycle: nobody else can compute it, and a restart does not change it."""
    return lambda run, cycle: identity.derive("beacon", run, str(cycle))
