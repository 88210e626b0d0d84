"""The full model of a run and its hold-outs in memory: what a state does to the sequences that were drawn.

Submissions are judged on the full model, because the training model can be gamed. Their rows are written into it in
place; the hidden states below the first adapted layer are computed once per cycle.
"""

from __future__ import annotations

import functools
import tempfile
import threading
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from connito.data.corpus import Corpus
from connito.data.packing import Rows
from connito.errors import Retry
from connito.protocol.claims import claim_of
from connito.protocol.coding import decoded
from connito.protocol.holdout import draw_to_score, subsets
from connito.protocol.merging.aggregators import layer_of
from connito.protocol.merging.by_expert import judged, use_of
from connito.protocol.scoring.evaluation import Losses, Measurable, Parts
from connito.protocol.sequences import sequences
from connito.protocol.submission import read_header, validate
from connito.runtime import logs
from connito.runtime.compute import set_threads
from connito.v1.run_pb2 import RunSpec, SelectionMade
from connito.wire.facts import RunFacts, experts_of
from connito.workloads.claims import Recount, Text
from connito.workloads.shared_losses import SharedLosses

if TYPE_CHECKING:
    import torch

    from connito.moe.evaluate import Evaluator

    State = dict[str, torch.Tensor]

PROGRESS_SECONDS = 2.0

log = logs.get_logger("measuring")


@dataclass(frozen=True)
class Holdout:
    """All sequences of a domain's hold-out, [n, L + 1], and the numbers of those that may be drawn to score."""

    sequences: Rows
    pool: list[int]


@dataclass(frozen=True)
class SubmissionFiles:
    """A submission on disk. `origin` is the state it started from, if that is not the cycle's: a late reveal. `name`: the digests
    of all that its losses follow from; empty where they are not shared.
    """

    artifact: Path
    origin: Path | None
    name: str = ""


class SubmissionEvaluator:
    """The model and the hold-outs of one run. Blocking, for one thread at a time."""

    def __init__(
        self,
        evaluator: Evaluator,
        holdouts: Mapping[str, Holdout],
        spec: RunSpec,
        selection: SelectionMade,
        shared: SharedLosses | None = None,
    ) -> None:
        self._evaluator, self._holdouts, self._spec, self._selection = evaluator, holdouts, spec, selection
        self._shared = shared or SharedLosses(None, spec.run)

    @classmethod
    def load(
        cls,
        spec: RunSpec,
        selection: SelectionMade,
        files: Mapping[str, Path],
        holdouts: Mapping[str, Path],
        *,
        device: str = "",
        threads: int = 0,
        batch_tokens: int = 2048,
        cache_bytes: int = 1 << 30,
        losses_dir: Path | None = None,
    ) -> SubmissionEvaluator:
        """Map the base from `files` and read the hold-outs by domain. Raises `Invalid` for data that does not fit.

        device: empty for the one that every model runs on here. threads: as `set_threads` takes them. losses_dir: where
        validators of one owner share what they measured. The rest is `Evaluator`'s.
        """
        import torch

        from connito.base.loading import load_full
        from connito.moe.device import device_of
        from connito.moe.evaluate import Evaluator

        set_threads(threads)
        read = {domain: read_holdout(path, spec, domain) for domain, path in holdouts.items()}
        model = load_full(files, device=device_of(device))
        targets, _ = experts_of(selection)
        evaluator = Evaluator(model, targets, batch_tokens=batch_tokens, cache_bytes=cache_bytes)
        place = (str(next(model.parameters()).device), torch.__version__, torch.get_num_threads(), batch_tokens)
        base = (spec.base.manifest.digest, str(targets))
        return cls(evaluator, read, spec, selection, SharedLosses(losses_dir, spec.run, *base, *map(str, place)))

    def close(self) -> None:
        """Let go of what is shared of a run that has ended."""
        self._shared.close()

    def recount(self, text: Text, facts: RunFacts, cycle: int, drawn: Container[str]) -> Recount:
        """Return what counts the claims of drawn submissions again, on this model."""
        return Recount(self._evaluator, text, facts, cycle, drawn, self._shared)

    def draw(self, seed: bytes) -> dict[str, list[int]]:
        """Return the numbers of the held-out sequences that the seed gives, by domain, the target first."""
        drawn = {name: draw_to_score(seed, name, of.pool, self._spec) for name, of in self._holdouts.items()}
        return {domain: numbers for domain, numbers in drawn.items() if numbers}

    def incumbent(
        self, state: Path, drawn: Mapping[str, list[int]], stop: threading.Event, name: str = ""
    ) -> Callable[[Parts], Losses]:
        """Return losses of the cycle's own state θ_t, the same parts measured once. `name`: its digest, where they are shared.

        A new cycle begins here: hidden states of sequences that are not drawn make room for those that are.
        """
        from connito.moe.state import load_state

        drawn_rows = (self._holdouts[domain].sequences[numbers] for domain, numbers in drawn.items())
        self._evaluator.keep_only(row for rows in drawn_rows for row in rows)
        return functools.cache(self._measuring(load_state(state), drawn, stop, "incumbent", name))

    def submission(
        self,
        state: Path,
        files: SubmissionFiles,
        drawn: Mapping[str, list[int]],
        before: Callable[[Parts], Losses],
        stop: threading.Event,
        who: str,
    ) -> Measurable:
        """Return losses with a submission in the model, of which each expert counts as the run's rules have it judged.

        Raises `Invalid` with the reason for one that cannot be measured.
        """
        from connito.moe.state import load_state

        begun_from = files.origin or state
        with tempfile.TemporaryDirectory(prefix="connito-decode-") as folder:
            rows_of = decoded(files.artifact, begun_from, self._spec.training, Path(folder))
            validate(rows_of, read_header(state))
            claim = claim_of(read_header(rows_of), self._spec, self._selection)
            strength = judged([claim], use_of(self._selection))
            artifact = load_state(rows_of)
        origin = load_state(begun_from)
        if all(artifact[name].equal(rows) for name, rows in origin.items()):
            return Measurable(before, before, unchanged=True)
        candidate = artifact
        if files.origin is not None or any((rows < 1.0).any() for rows in strength.values()):
            candidate = rebase(
                artifact, origin, load_state(state), {layer: rows[0] for layer, rows in strength.items()}
            )
        return Measurable(before, self._measuring(candidate, drawn, stop, who, files.name), unchanged=False)

    def _measuring(
        self, state: State, drawn: Mapping[str, list[int]], stop: threading.Event, who: str, name: str
    ) -> Callable[[Parts], Losses]:
        progress = _Progress(who, sum(map(len, drawn.values())), stop)

        def measure(parts: Parts) -> Losses:
            # At once: a forward of few sequences takes as long as reading the experts' weights does.
            sequences = np.concatenate(
                [self._holdouts[part.domain].sequences[drawn[part.domain][part.begin : part.end]] for part in parts]
            )
            return self._shared.of(
                name, sequences, lambda: Losses(*self._evaluator.losses(state, sequences, progress.part()))
            )

        return measure


def rebase(artifact: State, origin: State, current: State, strength: Mapping[int, NDArray[np.float64]]) -> State:
    """Return θ_t − a·δ with δ = origin − artifact, computed in float32: work on the state that stands now, of which each expert
    counts by its strength a, [S] by layer; in full in layers without.
    """
    import torch

    found = {}
    for name, rows in current.items():
        moved = artifact[name].float() - origin[name].float()
        share = strength.get(layer_of(name))
        if share is not None:
            moved *= torch.from_numpy(share).float().view(-1, *([1] * (moved.ndim - 1)))
        found[name] = (rows.float() + moved).to(rows.dtype)
    return found


def read_holdout(path: Path, spec: RunSpec, domain: str) -> Holdout:
    """Return a hold-out corpus as sequences of the run's length, and the part of it that scores submissions."""
    rows = sequences(Corpus.load(path), spec)
    return Holdout(rows, subsets(rows, spec, domain).score)


class _Progress:
    """One line every two seconds, and the place where a stop is noticed."""

    def __init__(self, who: str, total: int, stop: threading.Event) -> None:
        self._who, self._total, self._stop = who, total, stop
        self._finished, self._since = 0, time.monotonic()

    def part(self) -> Any:
        """Return the callback for the next part."""
        base = self._finished

        def on_batch(done: int, _: int) -> None:
            if self._stop.is_set():
                raise Retry("stopped while scoring")
            self._finished = base + done
            if time.monotonic() - self._since >= PROGRESS_SECONDS:
                self._since = time.monotonic()
                log.info("scoring", submission=self._who, sequences=self._finished, of=self._total)

        return on_batch
