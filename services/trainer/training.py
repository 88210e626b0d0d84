"""The honest work: H local steps on the target rows, on a model of which only what is needed is in memory.

The model stays between cycles; a new cycle only puts other rows into it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.corpus import Corpus, check_vocabulary
from connito.data.packing import Rows, tokens_of
from connito.errors import Invalid, Retry
from connito.moe.device import devices_of
from connito.moe.engine import Engine
from connito.moe.residency import ALL, AUTO
from connito.moe.schedule import Schedule
from connito.protocol.claims import by_expert, claimed_rows, metadata_of
from connito.protocol.policy.choices import ADAMW, MUON
from connito.protocol.progress import training
from connito.protocol.sequences import miner_batches, replays, sequences
from connito.runtime import logs, metrics
from connito.runtime.compute import ComputeBudget, in_thread, set_threads
from connito.v1.run_pb2 import CorpusRef, RunSpec, TrainPolicy
from connito.wire.facts import RunFacts, experts_of

from .adapters import Downloads
from .base import Base
from .evaluation import Evaluation, hold_back
from .settings import TrainerSettings
from .strategy import Effort

if TYPE_CHECKING:
    from connito.moe.footprint import Workload
    from connito.moe.moments import Moments
    from connito.moe.personal import PersonalRouters
    from connito.moe.prefix import Beginnings
    from connito.moe.state import TargetState
    from connito.moe.training import Step
    from torch import nn

PROGRESS_SECONDS = 2.0
# A miner's own routers, in the cycle's folder.
ROUTERS = "routers.safetensors"

log = logs.get_logger("training")


@dataclass
class _Loaded:
    """The training model of one run."""

    run: str
    model: nn.Module
    beginnings: Beginnings


class LocalTrainer:
    """Trains, one cycle at a time, within the machine's compute budget."""

    def __init__(self, me: str, downloads: Downloads, compute: ComputeBudget, settings: TrainerSettings) -> None:
        self._me, self._downloads, self._compute, self._settings = me, downloads, compute, settings
        self._loaded: _Loaded | None = None
        self._one_at_a_time = asyncio.Lock()

    async def train(self, facts: RunFacts, cycle: int, state: Path, draft: Path) -> Effort:
        """Train H steps from the state in `state` and write the result to `draft`.

        Stops early when the train window closes: the commit window opens then, and what is done can still be committed.
        Raises `Retry` when even the commit window closed before a step was made.
        """
        batches = await self._batches(facts, cycle)
        base = await Base.fetch(facts, self._downloads)
        async with self._one_at_a_time, self._compute.slot("train"):
            if facts.window("commit", cycle).closed is not None:
                raise Retry(f"cycle {cycle} closed while this miner waited for its turn to compute")

            def work(stop: threading.Event) -> Effort:
                return self._train(
                    facts,
                    cycle,
                    base,
                    state,
                    draft,
                    batches,
                    lambda: stop.is_set() or facts.window("train", cycle).closed is not None,
                )

            return await in_thread(work)

    async def _batches(self, facts: RunFacts, cycle: int) -> Rows:
        """Return [H, B, L + 1]: this miner's share of the training text."""
        spec = facts.require_spec()
        train = await self._rows(facts.run, spec, spec.train)
        replay = await self._rows(facts.run, spec, spec.replay) if replays(spec) else None
        return miner_batches(facts, cycle, self._me, train, replay)

    async def _rows(self, run: str, spec: RunSpec, reference: CorpusRef) -> Rows:
        path = await self._downloads.fetch(run, reference.artifact)
        return await asyncio.to_thread(lambda: sequences(Corpus.load(path), spec))

    def _train(
        self,
        facts: RunFacts,
        cycle: int,
        base: Base,
        state: Path,
        draft: Path,
        batches: Rows,
        should_stop: Callable[[], bool],
    ) -> Effort:
        from connito.moe.state import save_state
        from connito.moe.training import betas_of, train_local

        policy, begun = training(facts, cycle), time.perf_counter()
        loaded = self._begun(facts, base, state, batches)
        model = loaded.model
        bf16 = self._settings.computes_in_bf16
        claim = claim_for(facts, model, batches, loaded.beginnings, bf16=bf16)
        batches, apart = hold_back(batches, self._settings.evaluation_share)
        own = Evaluation(model, apart, len(batches), self._settings)
        progress, schedule = _Progress(len(batches), own), schedule_of(facts.require_spec())
        moments = (
            OptimizerState(draft.parent).load(second_only=policy.moments == "second") if remembers(policy) else None
        )
        own_routers = routers_of(model, policy, draft.parent)
        try:
            result, stats = train_local(
                model,
                batches,
                learning_rate=policy.learning_rate,
                weight_decay=policy.weight_decay,
                betas=betas_of(policy),
                inner=policy.optimizer or ADAMW,
                bf16=bf16,
                micro_batch=self._settings.micro_batch,
                factor=lambda step: schedule.factor(cycle, step),
                optimizer=self._settings.optimizer,
                moments=moments,
                beside=own_routers,
                beginnings=loaded.beginnings,
                on_step=progress,
                should_stop=lambda: should_stop() or own.stopped,
            )
        finally:
            if own_routers is not None:
                own_routers.close()
                own_routers.save(draft.parent / ROUTERS)
        if moments is not None:
            OptimizerState(draft.parent).save(moments)
        save_state(own.best if own.stopped and own.best is not None else result, draft, claim)
        log.info(
            "trained",
            steps=stats.steps,
            tokens=stats.tokens,
            seconds=round(stats.seconds, 2),
            loss_first=round(stats.first_loss, 4),
            loss_last=round(stats.last_loss, 4),
            stopped_early=own.stopped,
        )
        return Effort(stats.steps, stats.tokens, time.perf_counter() - begun, tuple(own.losses))

    def _begun(self, facts: RunFacts, base: Base, state: Path, batches: Rows) -> _Loaded:
        """Return the training model of the run with the target rows of `state`, which takes these tokens."""
        from connito.moe.resident import write_targets
        from connito.moe.state import load_state

        begin = load_state(state)
        loaded = self._model(facts, base, begin)
        check_tokens(loaded.model, batches)
        write_targets(loaded.model, begin)
        return loaded

    def _model(self, facts: RunFacts, base: Base, state: TargetState) -> _Loaded:
        """Return the training model of the run; another run's is released first."""
        from connito.moe.prefix import Beginnings

        if self._loaded is None or self._loaded.run != facts.run:
            self._loaded = None
            begun = time.perf_counter()
            settings = self._settings
            set_threads(settings.torch_threads)
            devices = devices_of(settings.device)
            device = devices[0]
            work = check_memory(facts, base, device, settings, engine_of(settings, devices))
            model = base.load(facts, device, work, state, top_k=settings.top_k)
            log.info("model loaded", source=base.source, seconds=round(time.perf_counter() - begun, 2))
            self._loaded = _Loaded(facts.run, model, Beginnings(model, bf16=settings.computes_in_bf16))
        return self._loaded


def remembers(policy: TrainPolicy) -> bool:
    """Return whether a cycle's local steps go on with moments of the one before."""
    return policy.moments not in ("", "fresh") and policy.optimizer != MUON


class _Progress:
    """One line every two seconds, and the miner's own evaluation."""

    def __init__(self, steps: int, own: Evaluation) -> None:
        self._own = own
        self._steps, self._tokens, self._since = steps, 0, time.monotonic()

    def __call__(self, step: Step) -> None:
        metrics.TRAIN_STEP_SECONDS.observe(step.seconds)
        metrics.TRAIN_TOKENS.inc(step.tokens)
        self._tokens += step.tokens
        elapsed = time.monotonic() - self._since
        if elapsed >= PROGRESS_SECONDS or step.index + 1 == self._steps:
            rate = round(self._tokens / max(elapsed, 1e-9))
            log.info("training", step=step.index + 1, of=self._steps, loss=round(step.loss, 4), tokens_per_second=rate)
            self._tokens, self._since = 0, time.monotonic()
        self._own(step)


class OptimizerState:
    """The optimiser's moments, in the cycle's folder beside its result. A new cycle goes on from the one before.

    A cycle that is trained again after a crash starts from the same moments, so it ends in the same result.
    """

    NAME = "moments.safetensors"

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, folder.parent / str(int(folder.name) - 1)

    def load(self, *, second_only: bool) -> Moments:
        """Return those that the cycle before ended with; empty ones when it was missed or they cannot be read."""
        from connito.moe.moments import Moments

        path = self._before / self.NAME
        if not path.exists():
            return Moments(second_only=second_only)
        try:
            return Moments.load(path, second_only=second_only)
        except Invalid as error:
            log.warning("starting with empty moments", because=str(error))
            return Moments(second_only=second_only)

    def save(self, moments: Moments) -> None:
        """Keep them for the next cycle."""
        moments.save(self._folder / self.NAME)


def claim_for(
    facts: RunFacts, model: nn.Module, batches: Rows, beginnings: Beginnings, *, bf16: bool
) -> dict[str, str]:
    """Return the metadata that claims the tokens of `batches` by expert, with θ_t in the model; nothing where no run asks.

    `bf16` counts under autocast, as a model with weights of that type needs. `beginnings` keeps what the first steps need again.
    """
    from connito.moe.batches import home_of, mixed
    from connito.moe.routed import routed_tokens

    if not by_expert(facts.require_spec()):
        return {}
    selected, _ = experts_of(facts.require_selection())
    rows = claimed_rows(batches)
    with mixed(home_of(model), bf16=bf16), beginnings.keep(rows):
        return metadata_of(routed_tokens(model, selected, rows))


def check_tokens(model: nn.Module, batches: Rows) -> None:
    """Raise `Invalid` if the text holds tokens that the model has no embeddings of: on a GPU, the whole process would be lost."""
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator]
    check_vocabulary(int(tokens_of(batches).max(initial=-1)), len(embeddings), "training text")


def schedule_of(spec: RunSpec) -> Schedule:
    """Return the learning rate over the run. A policy that says nothing keeps it."""
    policy = spec.training
    return Schedule(spec.cycles, policy.local_steps, policy.final_rate_share or 1.0, policy.warmup_steps)


def routers_of(model: nn.Module, policy: TrainPolicy, folder: Path) -> PersonalRouters | None:
    """Return this miner's own routers as the cycle before `folder` left them, where the policy asks for them."""
    from connito.moe.personal import Personal, PersonalRouters
    from safetensors.torch import load_file

    if policy.router_distillation <= 0:
        return None
    before = folder.parent / str(int(folder.name) - 1) / ROUTERS
    start = load_file(before) if before.exists() else None
    return PersonalRouters(model, Personal(policy.router_distillation, policy.distillation_share), start)


def check_memory(facts: RunFacts, base: Base, device: Any, settings: TrainerSettings, engine: Engine) -> Workload:
    """Return what the training model will be like, chosen by the memory there is before any of it is loaded.

    Raises `Invalid` (DOES_NOT_FIT) with the numbers when it will not fit.
    """
    import torch
    from connito.moe.footprint import SWITCHES, Workload, fit, free_bytes
    from connito.workloads.predicting import predictor

    policy = facts.require_spec().training
    work = Workload(
        policy.batch_sequences,
        policy.sequence_length,
        half=settings.bf16_parameters,
        background=base.background is not None,
        bf16=settings.bf16,
        micro_batch=settings.micro_batch,
        top_k=settings.top_k,
        routing_mode=policy.routing_mode or "natural",
        inner=policy.optimizer or ADAMW,
        residency=ALL if settings.residency == AUTO else settings.residency,
        engine=replace(engine, checkpointing=settings.checkpointing == "on"),
        cuda=device.type == "cuda",
        packed=True,
    )
    have = settings.memory_bytes
    if not have:
        have = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
    where = "CONNITO_MEMORY_BYTES" if settings.memory_bytes else f"this machine ({device})"
    mine = tuple(switch for switch in SWITCHES if getattr(settings, switch.field, None) == AUTO)
    predict = predictor(base.config(), *experts_of(facts.require_selection()), settings.cache_dir / "footprints")
    work = fit(predict, work, have, where, mine)
    log.info(
        "memory predicted",
        need_bytes=predict(work).total,
        free_bytes=have,
        residency=work.residency,
        checkpointing=work.engine.checkpointing,
    )
    return work


def engine_of(settings: TrainerSettings, devices: Sequence[Any]) -> Engine:
    """Return how this machine trains; whether with checkpointing is settled by the memory there is."""
    return Engine(
        optimizer=settings.optimizer,
        attention=settings.attention,
        experts=settings.experts,
        compile=settings.compile,
        offload_prefix=settings.offload_prefix,
        devices=tuple(map(str, devices)) if len(devices) > 1 else (),
    )
