"""Performing what the validator decided."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from connito.bus import Bus, offences
from connito.errors import Environment, Invalid, Retry
from connito.protocol.asked import check_asked
from connito.protocol.assignment import assigned
from connito.protocol.beacon import secret_digest
from connito.protocol.claims import drawn_claims
from connito.protocol.findings import OF_THE_FILE, Refusal
from connito.protocol.scoring.evaluation import Evaluation, fit, rejected, score
from connito.runtime import logs, metrics
from connito.runtime.compute import ComputeBudget, in_thread
from connito.service.engine import Action
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.sentences import detail_of, sentence
from connito.wire.bounds import WORDS_BYTES, cut
from connito.wire.checkpoint import cosignature
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts
from connito.wire.hashing import hash_fields
from connito.wire.heads import LogTrees
from connito.wire.identity import Identity, short_key
from connito.wire.locked import unlocked
from connito.wire.sealing import MEDIA_TYPE as SEALED
from connito.wire.sealing import parse_boxes
from connito.workloads.claims import Recount, Text
from connito.workloads.fetching import fetch_base, fetch_holdouts, fetch_state, fetch_text, holdout_refs
from connito.workloads.scoring import SubmissionEvaluator, SubmissionFiles

from .handlers import CommitSeed, Cosign, Doubt, Join, Object, Preload, RevealSeed, Score, Unload
from .memory import Memory
from .settings import ValidatorSettings

log = logs.get_logger("validator")

# Of those whom an objection is about; a reader of the log finds them all.
MAX_NAMED = 8

Files = dict[str, SubmissionFiles]


class Validator:
    """The dependencies of a validator's actions. `loaded` are the runs whose model is in memory."""

    def __init__(
        self,
        bus: Bus,
        store: ArtifactStore,
        compute: ComputeBudget,
        settings: ValidatorSettings,
        facts: Callable[[str], RunFacts],
        trees: LogTrees,
        memory: Memory,
        load: Callable[..., SubmissionEvaluator] = SubmissionEvaluator.load,
    ) -> None:
        self._bus, self._store, self._compute, self._settings, self._facts = bus, store, compute, settings, facts
        self._trees, self._memory, self._load_model = trees, memory, load
        self._evaluators: dict[str, SubmissionEvaluator] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._texts: dict[str, Text] = {}
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
                check_asked(self._facts(run).require_created())
                await self._check_readable(run)
                joined = run_pb2.ValidatorJoined(run=run, validator=self.me, label=self._settings.label)
                await self._bus.publish_fact(run, "run", 0, "validator", joined, self.me)
            case Preload():
                await self._evaluator(run)
            case Unload():
                if (gone := self._evaluators.pop(run, None)) is not None:
                    await asyncio.to_thread(gone.close)
                self._texts.pop(run, None)
            case CommitSeed(cycle):
                digest = secret_digest(run, cycle, self.me, self.secret(self._facts(run), cycle))
                message = cycle_pb2.SeedCommitted(run=run, cycle=cycle, validator=self.me, digest=digest)
                await self._bus.publish_fact(run, "train", cycle, "seed", message, self.me)
            case Doubt(_, validators):
                raise Retry(
                    f"this validator takes no part: the log counts another stake than its roster for "
                    f"{', '.join(map(short_key, validators[:MAX_NAMED]))}; give it the operator's roster, or ask the operator",
                    after=5.0,
                )
            case RevealSeed(cycle):
                await self._reveal(run, cycle)
            case Object(cycle, finding):
                await self._object(run, cycle, finding)
            case Cosign(number):
                await self._cosign(run, number)
            case Score(cycle):
                logs.bind_run(run, cycle)
                await self._score(run, cycle)

    async def _object(self, run: str, cycle: int, finding: cycle_pb2.Finding) -> None:
        """Refuse a cycle, with the rule that it breaks."""
        why = sentence(finding)
        offences.report("wrong_draw", subject=f"{run}.validate.{cycle}", detail=why)
        log.error("the cycle breaks a rule, so it is not scored", security=True, why=why)
        message = cycle_pb2.Objection(run=run, cycle=cycle, validator=self.me, finding=finding)
        del message.finding.miners[MAX_NAMED:]
        await self._bus.publish_fact(run, "validate", cycle, "objection", message, self.me)

    async def _reveal(self, run: str, cycle: int) -> None:
        """Tell a secret, once: in another history of the cycle it would be known beforehand."""
        facts = self._facts(run)
        try:
            self._memory.reveal(facts, cycle)
        except Invalid as error:
            await self._object(run, cycle, _other_history(cycle, error))
            return
        revealed = cycle_pb2.SeedRevealed(run=run, cycle=cycle, validator=self.me, secret=self.secret(facts, cycle))
        await self._bus.publish_fact(run, "validate", cycle, "seed", revealed, self.me)

    async def _cosign(self, run: str, number: int) -> None:
        """Sign a head too, if it is of the log as it was read here, now and before; object to the cycle otherwise. Raises `Retry`
        before all of it was read.
        """
        facts = self._facts(run)
        try:
            checkpoint = self._trees.checkpoint(facts, number)
            self._memory.cosign(facts, checkpoint)
        except Invalid as error:
            await self._object(run, max(1, facts.cycle), _other_history(number, error))
            return
        line = cosignature(checkpoint, self._bus.identity, self._bus.host.now_ms() // 1000)
        message = run_pb2.HeadCosigned(run=run, cycle=number, validator=self.me, signature=line)
        await self._bus.publish_fact(run, "run", number, "cosigned", message, self.me)

    async def _check_readable(self, run: str) -> None:
        """Raise `Retry` where the hold-outs are sealed to others: whoever joins has to judge. An admitted key is asked again."""
        spec = self._facts(run).require_spec()
        if not any(ref.media_type == SEALED for ref in holdout_refs(spec).values()):
            return
        try:
            await fetch_holdouts(self._store, spec, self._bus.identity, self._lent())
        except Invalid as error:
            raise Retry(f"this validator takes no part in run {run}: {error}", after=30.0) from error

    def _lent(self) -> dict[str, str]:
        """Return the boxes that were lent to this validator; read each time, because it waits for them."""
        path = self._settings.lent
        return {} if path is None or not path.exists() else parse_boxes(path.read_bytes(), str(path))

    async def _evaluator(self, run: str) -> SubmissionEvaluator:
        """Return the run's model and hold-outs, loaded once."""
        async with self._loading.setdefault(run, asyncio.Lock()):
            if run not in self._evaluators:
                self._evaluators[run] = await self._load(run)
            return self._evaluators[run]

    async def _load(self, run: str) -> SubmissionEvaluator:
        facts, begun = self._facts(run), self._bus.host.monotonic()
        spec, selection = facts.require_spec(), facts.require_selection()
        base, holdouts = (
            await fetch_base(self._store, spec),
            await fetch_holdouts(self._store, spec, self._bus.identity, self._lent()),
        )
        settings = self._settings
        load = partial(
            self._load_model, spec, selection, base.files, holdouts,
            device=settings.device, threads=settings.torch_threads, batch_tokens=settings.batch_tokens,
            cache_bytes=settings.hidden_cache_bytes, losses_dir=settings.losses_dir,
        )  # fmt: skip
        async with self._compute.slot("load"):
            evaluator = await asyncio.to_thread(load)
        log.info("model loaded", seconds=round(self._bus.host.monotonic() - begun, 2))
        return evaluator

    async def _score(self, run: str, cycle: int) -> None:
        facts = self._facts(run)
        seed = facts.require_drawn(cycle).seed
        opened, settled = facts.window("train", cycle).require_opened(), facts.window("submit", cycle).require_settled()
        state = await fetch_state(facts, opened.state, self._store.cache, self._store.fetch)
        duties = assigned(facts, cycle)
        submissions = [entry for entry in settled.submissions if duties is None or entry.miner in duties[self.me]]
        fetched = await asyncio.gather(*(self._fetch(item, opened.state) for item in submissions))
        files: Files = {item.miner: result for item, result in zip(submissions, fetched, strict=True)}
        evaluator = await self._evaluator(run)
        drawn = drawn_claims(facts, cycle, (item.miner for item in settled.submissions))
        if drawn and run not in self._texts:
            self._texts[run] = await asyncio.to_thread(
                Text, facts.require_spec(), *await fetch_text(self._store, facts)
            )
        recount = evaluator.recount(self._texts[run], facts, cycle, drawn) if drawn else None
        async with self._measuring, self._compute.slot("score"):
            report = await in_thread(
                lambda stop: self._measure(facts, evaluator, cycle, seed, state, submissions, files, recount, stop)
            )
        report.state_digest = opened.state.digest
        if left_out := fit(report):
            log.warning("the report is large: per-sequence losses are left out", submissions=left_out)
        await self._bus.publish_fact(run, "validate", cycle, "report", report, self.me)
        log.info(
            "reported", submissions=len(submissions), of=len(settled.submissions), seconds=round(report.seconds, 2)
        )

    async def _fetch(self, submission: cycle_pb2.Submission, current: ArtifactRef) -> SubmissionFiles:
        """Return the submission's files. What the committer accepted was there: that it is not now is nobody's fault."""
        artifact = await self._store.fetch(submission.artifact)
        origin, name = submission.base_state, shared_name(submission, current)
        if origin.digest in ("", current.digest):
            return SubmissionFiles(artifact, None, name)
        return SubmissionFiles(artifact, await self._store.fetch(origin), name)

    def _measure(
        self,
        facts: RunFacts,
        evaluator: SubmissionEvaluator,
        cycle: int,
        seed: bytes,
        state: Path,
        submissions: Sequence[cycle_pb2.Submission],
        files: Files,
        recount: Recount | None,
        stop: threading.Event,
    ) -> cycle_pb2.ScoreReport:
        """Score the submissions against the incumbent, one after the other, on the drawn sequences."""
        begun = self._bus.host.monotonic()
        report = cycle_pb2.ScoreReport(run=facts.run, cycle=cycle, validator=self.me, seed=seed)
        drawn = evaluator.draw(seed)
        before = evaluator.incumbent(state, drawn, stop, facts.window("train", cycle).require_opened().state.digest)
        scores: dict[int, cycle_pb2.SubmissionScore] = {}
        for place in in_turn(submissions, self.me):
            submission = submissions[place]
            with metrics.SCORE_SECONDS.time(), tempfile.TemporaryDirectory(prefix="connito-unlock-") as folder:
                try:
                    clear = unlocked(files[submission.miner].artifact, submission.artifact, Path(folder))
                    found = replace(files[submission.miner], artifact=clear)
                    lie = recount and recount.falsehood(submission, found.artifact, found.origin or state)
                    measurable = evaluator.submission(state, found, drawn, before, stop, submission.miner)
                    evaluation = Evaluation(drawn, measurable, facts.require_spec().holdout.domain)
                    item = rejected(submission, lie) if lie else score(submission, evaluation, facts.require_spec())
                    if lie:
                        text = f"artifact {submission.artifact.digest}: {sentence(lie.finding)}"
                        offences.report("false_claim", key=submission.miner, reason=lie.reason, detail=text)
                except Invalid as error:
                    if isinstance(error, Environment) or error.reason not in OF_THE_FILE:
                        raise
                    item = rejected(submission, Refusal.of(error))
            scores[place] = item
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
        report.scores.extend(scores[place] for place in range(len(submissions)))
        report.seconds = self._bus.host.monotonic() - begun
        return report


def _other_history(number: int, error: Invalid) -> cycle_pb2.Finding:
    kind = cycle_pb2.FINDING_KIND_RULE_HISTORY
    return cycle_pb2.Finding(kind=kind, count=number, text=cut(str(error), WORDS_BYTES))


def in_turn(submissions: Sequence[cycle_pb2.Submission], me: str) -> list[int]:
    """Return the places of submissions in an order of this validator's own: those that share losses then seldom wait for each
    other.
    """
    return sorted(
        range(len(submissions)), key=lambda place: hash_fields(b"turn", me, submissions[place].artifact.digest)
    )


def shared_name(submission: cycle_pb2.Submission, current: ArtifactRef) -> str:
    """Return what the losses of a submission follow from: coded bytes are another state on another θ_t."""
    origin = submission.base_state.digest or current.digest
    return f"{submission.artifact.digest} from {origin} on {current.digest}"


def secret_of(identity: Identity) -> Callable[[RunFacts, int], bytes]:
    """Return the beacon secret of each run and cycle: nobody else can compute it, and a restart does not change it.

    It is of this log alone, up to the head before the cycle. A log that begins with the same message and goes on otherwise must
    not repeat what was revealed.
    """

    def secret(facts: RunFacts, cycle: int) -> bytes:
        head = facts.head(cycle)
        return identity.derive("beacon", facts.run, str(cycle), *([] if head is None else [head.message.checkpoint]))

    return secret
