"""Pilot of a job: one miner's local steps of one cycle, made here, and what they do to target and general text. Needs torch.

Where the job leaves its replay open, the pilot looks for the smallest share at which general text holds by the rule that
validators judge by, in at most three trials, and remembers it for the submission.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from connito.data.corpus import Corpus
from connito.jobs import replay
from connito.jobs.check import Checked
from connito.protocol.holdout import subsets
from connito.protocol.policy.choices import ADAMW
from connito.protocol.progress import MOST_REPLAY
from connito.protocol.scoring.proof_of_loss import general_change, judge, paired
from connito.protocol.sequences import batches_of, sequences
from connito.runtime.progress import Progress
from connito.v1.reasons_pb2 import REASON_RETENTION_BROKEN
from connito.v1.run_pb2 import RunSpec

if TYPE_CHECKING:
    import numpy.typing as npt

    from connito.moe.selection import Selection

# Sequences of each hold-out's scoring part that the pilot is measured on.
_SEQUENCES = 32
_MINER = "pilot"
_WHAT = "training as one miner would, for one cycle"
_LEAST = 0.125


@dataclass(frozen=True)
class Trial:
    """Steps with one share of replay. Losses are nats per token of the full model; `general` is the mean change over domains."""

    replay: float
    seconds: float
    loss_before: float
    loss_after: float
    low: float
    high: float
    sequences: int
    tokens: int
    general: float
    general_sequences: int
    general_tokens: int
    retained: bool


@dataclass(frozen=True)
class Pilot:
    """The trials of one job; the last one counts: the smallest share that holds, or the largest that did not."""

    steps: int
    trials: tuple[Trial, ...]

    @property
    def replay(self) -> float:
        """Return the share of general text of the trial that counts."""
        return self.trials[-1].replay

    @property
    def retained(self) -> bool:
        """Return whether general text holds."""
        return self.trials[-1].retained

    @property
    def gain(self) -> float:
        """Return nats per token that the steps saved on the hold-out."""
        return self.trials[-1].loss_before - self.trials[-1].loss_after

    @property
    def low(self) -> float:
        """Return the lower bound of the gain."""
        return self.trials[-1].low

    @property
    def seconds(self) -> float:
        """Return the seconds of the steps."""
        return self.trials[-1].seconds

    def to_json(self) -> dict[str, Any]:
        """Return the pilot as plain data."""
        return {
            "steps": self.steps,
            **asdict(self.trials[-1]),
            "gain": self.gain,
            "trials": [*map(asdict, self.trials)],
        }


def try_out(checked: Checked, selection: Selection, progress: Progress) -> Pilot:
    """Train for one cycle, with as many shares of replay as it takes."""
    bench = _Bench(checked, selection, progress)
    given, corpora = checked.job.asked_replay, checked.corpora
    assert corpora is not None
    if given is not None or corpora.replay is None:
        return bench.pilot([bench.trial(given or 0.0)])
    trials = _search(bench)
    if trials[-1].retained:
        spec = checked.spec
        replay.remember(replay.pilot_key(spec, checked.context, corpora.train, corpora.replay), trials[-1].replay)
        spec.training.replay_share = trials[-1].replay
    return bench.pilot(trials)


def _search(bench: _Bench) -> list[Trial]:
    """Return the trials, the one that counts last: with little, then with none where that holds, or with more where not."""
    first = bench.trial(_LEAST)
    if first.retained:
        without = bench.trial(0.0)
        return [first, without] if without.retained else [without, first]
    second = bench.trial(replay.SHARE)
    return [first, second] if second.retained else [first, second, bench.trial(MOST_REPLAY)]


class _Bench:
    """The models and texts of a pilot, loaded once."""

    def __init__(self, checked: Checked, selection: Selection, progress: Progress) -> None:
        self._checked, self._selection, self._progress, self._done = checked, selection, progress, 0

    def pilot(self, trials: list[Trial]) -> Pilot:
        """Return the trials as what is reported, with the model given back."""
        self._evaluator.restore()
        return Pilot(self._checked.spec.training.local_steps, tuple(trials))

    def trial(self, share: float) -> Trial:
        """Train from the base with a share of replay, and measure."""
        from connito.moe.resident import compress

        spec = self._checked.spec
        local = compress(self._full(), self._selection.layers, self._selection.helpers, spec.training.routing_mode)
        began = time.perf_counter()
        state = self._train(local, share)
        seconds = time.perf_counter() - began
        self._done += 1
        found = {}
        for domain, (before, tokens) in self._before.items():
            after, _ = self._evaluator.losses(state, self._held[domain])
            found[domain] = paired(before.tolist(), after.tolist(), tokens.tolist(), spec.scoring.confidence)
        target, general = found.pop(spec.domain), found
        held, tokens = self._before[spec.domain]
        before_loss = float(held.sum()) / target.tokens
        judged = judge(target, general, spec.scoring)
        return Trial(
            share, seconds, before_loss, before_loss - target.effect, target.low, target.high, target.sequences, target.tokens,
            general_change(general, spec.scoring.confidence).mean,
            sum(domain.sequences for domain in general.values()), sum(domain.tokens for domain in general.values()),
            judged.reason != REASON_RETENTION_BROKEN,
        )  # fmt: skip

    def _train(self, local: Any, share: float) -> Any:
        from connito.moe.training import Step, betas_of, train_local
        from connito.v1.run_pb2 import TrainPolicy

        corpora, spec, policy = self._checked.corpora, self._checked.spec, TrainPolicy()
        assert corpora is not None
        policy.CopyFrom(spec.training)
        policy.replay_share = share
        general = None if corpora.replay is None or not share else sequences(corpora.replay, spec)
        batches = batches_of(spec.run, policy, 1, _MINER, [_MINER], sequences(corpora.train, spec), "", general)
        what = f"{_WHAT}, replay {share:g}"

        def on_step(step: Step) -> None:
            self._progress(what, 0.4 + 0.5 * (self._done + (step.index + 1) / policy.local_steps) / 3)

        state, _ = train_local(
            local,
            batches,
            learning_rate=policy.learning_rate,
            weight_decay=policy.weight_decay,
            betas=betas_of(policy),
            inner=policy.optimizer or ADAMW,
            on_step=on_step,
        )
        return state

    def _full(self) -> Any:
        from connito.base.loading import load_full
        from connito.moe.device import device_of

        return load_full(self._checked.context.files(), device=device_of())

    @cached_property
    def _evaluator(self) -> Any:
        from connito.moe.evaluate import Evaluator

        return Evaluator(self._full(), self._selection)

    @cached_property
    def _held(self) -> Mapping[str, npt.NDArray[Any]]:
        """Return the first sequences of the parts that submissions are scored on: never the gate's or the report's."""
        corpora, spec = self._checked.corpora, RunSpec()
        assert corpora is not None
        spec.CopyFrom(self._checked.spec)
        spec.holdout.domain = spec.domain
        found: dict[str, Corpus] = {
            spec.domain: corpora.holdout,
            **(corpora.general or self._checked.context.general_corpora()),
        }
        rows = {domain: sequences(corpus, spec) for domain, corpus in found.items()}
        most = dict.fromkeys(rows, spec.scoring.general_sequences) | {spec.domain: _SEQUENCES}
        return {name: of[subsets(of, spec, name).score[: min(_SEQUENCES, most[name])]] for name, of in rows.items()}

    @cached_property
    def _before(self) -> Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        self._progress("measuring the base", 0.35)
        return {domain: self._evaluator.losses(None, rows) for domain, rows in self._held.items()}
