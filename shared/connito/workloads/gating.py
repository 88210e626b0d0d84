"""Losses of expert states on the full model. Blocking; needs torch."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from connito.data.corpus import Corpus
from connito.data.tensors import Array
from connito.moe.state import load_state
from connito.protocol.holdout import subsets
from connito.protocol.merging.gate import Losses, Part
from connito.protocol.sequences import sequences
from connito.v1 import run_pb2
from connito.wire.facts import experts_of

if TYPE_CHECKING:
    from connito.moe.evaluate import Evaluator


@dataclass
class GateEvaluator:
    """A run's full model with the sequences of the gate and the report.

    Those never change, so the layers below the first adapted one run once per run; and a state is measured once,
    since what the gate let through is the next cycle's incumbent.
    """

    evaluator: Evaluator
    # By domain, the target first: [n, length + 1].
    sequences: Mapping[Part, Mapping[str, Array]]
    _known: dict[tuple[str, Part], Losses] = field(default_factory=dict)
    # For whoever shares the cores: held before they are, or two would each hold what the other waits for.
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    # States are written into the model in place: one thread at a time.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def load(
        cls,
        spec: run_pb2.RunSpec,
        selection: run_pb2.SelectionMade,
        files: Mapping[str, Path],
        holdouts: Mapping[str, Path],
    ) -> GateEvaluator:
        """Load from the base model's `files` by name and the held-out corpora by domain. Raises `Invalid`."""
        from connito.base.loading import load_full
        from connito.moe.device import device_of
        from connito.moe.evaluate import Evaluator

        held: dict[Part, dict[str, Array]] = {"gate": {}, "report": {}}
        for domain, path in holdouts.items():
            rows = sequences(Corpus.load(path), spec)
            parts = subsets(rows, spec, domain)
            held["gate"][domain] = rows[parts.gate]
            held["report"][domain] = rows[parts.report]
        layers, _ = experts_of(selection)
        return cls(Evaluator(load_full(files, device=device_of()), layers), held)

    def measure(self, part: Part, digest: str, state: Path) -> Losses:
        """Return losses of the state with this digest. Loads the file only if it was not measured before."""
        with self._lock:
            known = self._known.get((digest, part))
            if known is None:
                known = self._known[digest, part] = self._measure(part, state)
            return known

    def _measure(self, part: Part, state: Path) -> Losses:
        tables = {domain: table for domain, table in self.sequences[part].items() if len(table)}
        nll, tokens = self.evaluator.losses(load_state(state), np.concatenate(list(tables.values())))
        sums: dict[str, tuple[float, int]] = {}
        rows: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {}
        begin = 0
        for domain, table in tables.items():
            own = slice(begin, begin := begin + len(table))
            sums[domain] = (math.fsum(nll[own]), int(tokens[own].sum()))
            rows[domain] = (tuple(map(float, nll[own])), tuple(map(int, tokens[own])))
        return Losses(sums, rows)
