"""A model of six numbers: its loss is the squared distance to a goal, so training, scoring and merging are exact and quick."""

from __future__ import annotations

import asyncio
import functools
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from connito.data.corpus import Corpus
from connito.data.tensors import read_tensors, tensor_bytes
from connito.protocol.coding import decoded
from connito.protocol.findings import Refusal
from connito.protocol.holdout import subsets
from connito.protocol.merging.gate import Losses as GateLosses
from connito.protocol.policy.check import complete
from connito.protocol.scoring.evaluation import Losses, Measurable, Parts
from connito.protocol.sequences import sequences
from connito.protocol.submission import read_header, validate
from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import LayerSelection, RunSpec, SelectionMade
from connito.wire.facts import RunFacts
from connito.workloads.claims import Recount
from connito.workloads.scoring import SubmissionEvaluator, SubmissionFiles, read_holdout
from connito.workloads.shared_losses import SharedLosses

from services.trainer.strategy import Effort
from tests.unit.connito.audit.world import LENGTH, RUN, TENSOR, World, spec_of

GOAL = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], np.float32)
START = np.ones((2, 3), np.float32)
# How far a submission may go, of the norm of the state that it begins from.
MOVE = 0.35


def value_of(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(read_tensors(path, [TENSOR])[0][TENSOR], np.float32)


def loss_of(value: np.ndarray[Any, Any], domain: str, target: str, number: int) -> float:
    """Nats of one sequence."""
    if domain != target:
        return 2.0 * LENGTH
    return LENGTH * (1.0 + float(np.square(value - GOAL).sum()) * (1 + number / 100))


class Trainer:
    """Goes a tenth of the way to the goal, with an error that is another one each time."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng

    async def train(self, facts: RunFacts, cycle: int, state: Path, draft: Path) -> Effort:
        before = value_of(state)
        noise = np.random.default_rng(self._rng.getrandbits(64))
        step = 0.1 * (GOAL - before) + noise.normal(0, 0.15, before.shape)
        # An honest miner keeps to what the run allows, whatever its luck.
        step *= min(1.0, 0.9 * MOVE * np.linalg.norm(before) / np.linalg.norm(step))
        await asyncio.sleep(self._rng.uniform(0.1, 1.5))
        draft.write_bytes(
            tensor_bytes({TENSOR: (before + step).astype(np.float32)}, {"by": self._rng.randbytes(4).hex()})
        )
        return Effort(1, LENGTH, 1.0)


class Evaluator(SubmissionEvaluator):
    """What a validator measures with, the model apart."""

    def __init__(
        self, spec: RunSpec, selection: SelectionMade, files: Any, holdouts: Mapping[str, Path], **_: Any
    ) -> None:
        self._holdouts = {domain: read_holdout(path, spec, domain) for domain, path in holdouts.items()}
        self._spec, self._selection, self._shared = spec, selection, SharedLosses(None, spec.run)

    def recount(self, *_: Any) -> Recount:
        return NoClaims()

    def incumbent(
        self, state: Path, drawn: Mapping[str, list[int]], stop: Any, name: str = ""
    ) -> Callable[[Parts], Losses]:
        return functools.cache(self._losses(value_of(state), drawn))

    def submission(
        self, state: Path, files: SubmissionFiles, drawn: Any, before: Any, stop: Any, who: str
    ) -> Measurable:
        with tempfile.TemporaryDirectory() as folder:
            rows = decoded(files.artifact, files.origin or state, self._spec.training, Path(folder))
            validate(rows, read_header(state))
            value = value_of(rows)
        if files.origin is not None:
            value = value_of(state) + (value - value_of(files.origin))
        return Measurable(before, self._losses(value, drawn), unchanged=False)

    def _losses(self, value: Any, drawn: Mapping[str, list[int]]) -> Callable[[Parts], Losses]:
        target = self._spec.holdout.domain

        def measure(parts: Parts) -> Losses:
            sums = [
                loss_of(value, part.domain, target, number)
                for part in parts
                for number in drawn[part.domain][part.begin : part.end]
            ]
            return Losses(np.array(sums), np.full(len(sums), LENGTH))

        return measure


class NoClaims(Recount):
    """Nothing to count again: these submissions say nothing of where tokens went."""

    def __init__(self) -> None:
        """Need no model."""

    def falsehood(self, entry: cycle_pb2.Submission, artifact: Path, start: Path) -> Refusal | None:
        return None


class Gate:
    """What an aggregator measures with."""

    def __init__(self, spec: RunSpec, selection: SelectionMade, files: Any, holdouts: Mapping[str, Path]) -> None:
        self._target, self._parts = spec.holdout.domain, dict[tuple[str, str], list[int]]()
        self.turn = asyncio.Lock()
        for domain, path in holdouts.items():
            parts = subsets(sequences(Corpus.load(path), spec), spec, domain)
            self._parts["gate", domain], self._parts["report", domain] = parts.gate, parts.report

    def measure(self, part: str, digest: str, state: Path) -> GateLosses:
        value, sums = value_of(state), dict[str, tuple[float, int]]()
        rows = dict[str, tuple[tuple[float, ...], tuple[int, ...]]]()
        for (which, domain), numbers in self._parts.items():
            if which == part:
                losses = [loss_of(value, domain, self._target, number) for number in numbers]
                sums[domain] = (math.fsum(losses), LENGTH * len(numbers))
                rows[domain] = (tuple(losses), (LENGTH,) * len(numbers))
        return GateLosses(sums, rows)


@functools.cache
def materials() -> tuple[RunSpec, SelectionMade, dict[str, bytes]]:
    """The spec and the selection of every simulated run, and the objects that they name by key."""
    world = World()
    spec = spec_of(world, RunSpec().rewards)
    statistics = world.upload(b"statistics")
    report = world.upload(b'{"base":{"rest":"r","rows":"s"},"statistics":"%s"}' % statistics.digest.encode())
    selection = SelectionMade(
        run=RUN, layers=[LayerSelection(layer=0, experts=[1, 0])], report=report,
        initial_state=world.upload(tensor_bytes({TENSOR: START}, {"version": "0"})),
        selected_experts=2, total_experts=4, target_parameters=6, model_parameters=100,
    )  # fmt: skip
    return spec, selection, world.objects


def spec_for(cycles: int, miners: int, validators: int, customer: str, codec: str) -> RunSpec:
    spec = RunSpec()
    spec.CopyFrom(materials()[0])
    spec.cycles = cycles
    spec.scoring.max_relative_norm = MOVE
    spec.windows.min_miners, spec.windows.min_validators = miners, validators
    spec.windows.floor_seconds, spec.windows.ceiling_seconds, spec.windows.assemble_seconds = 5, 30, 600
    spec.retention.cycles = 1000
    spec.training.codec = codec
    return complete(spec, customer)
