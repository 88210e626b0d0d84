"""Setup of the figures on training: tiny bases, text of their domains, selections, and losses of the full model.

A base per seed in a full run. A quick run builds one base and lets the seeds draw text only, because building takes
longer than measuring; its settings say so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.compose_setup import base, text
from bench.harness import Options, interval, note

if TYPE_CHECKING:
    from connito.moe.selection import Selection
    from torch import nn

Tokens = npt.NDArray[np.int32]
LENGTH = 64
GENERAL_OFFSET, HELD_OFFSET, PROBE_OFFSET, TRAIN_OFFSET = 4000, 9000, 6000, 2000


@dataclass(frozen=True)
class Rig:
    """One repetition: the base it starts from, and the seed of its text."""

    seed: int
    source: Path

    def model(self) -> nn.Module:
        """Return a fresh full model, frozen, in memory of its own."""
        from connito.base.loading import load_full

        return load_full(self.source)

    def train(self, domain: str, count: int) -> Tokens:
        """Return training sequences [count, LENGTH + 1]."""
        return text(domain, count, TRAIN_OFFSET + self.seed, LENGTH)

    def held(self, domain: str, count: int) -> Tokens:
        """Return held-out sequences, drawn apart from everything else."""
        return text(domain, count, HELD_OFFSET + self.seed, LENGTH)

    def probe(self, domains: Sequence[str], count: int) -> Tokens:
        """Return the probe of a selection: `count` sequences of each domain."""
        return np.concatenate([text(domain, count, PROBE_OFFSET + self.seed, LENGTH) for domain in domains])

    def select(self, domains: Sequence[str], per_layer: int, helpers: int = 2) -> Selection:
        """Return the `per_layer` experts of each layer that the domains use most, and helpers beside them."""
        from connito.moe.budget import Budget
        from connito.moe.selection import select_experts
        from connito.moe.statistics import collect

        statistics = collect(self.model(), self.probe(domains, 8)[:, :-1])
        return select_experts(
            statistics,
            "esft-token",
            1.0,
            budget=Budget(per_layer, scope="layer"),
            helpers_per_layer=helpers,
            domain="target",
        )


@contextmanager
def rigs(options: Options, *, quick_seeds: int, expert_steps: int = 0) -> Iterator[Iterator[Rig]]:
    """Yield one rig per seed, with one torch thread. `expert_steps` > 0 trains all experts of the base first, so that
    they differ.
    """
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        yield _each(options, Path(folder), quick_seeds, expert_steps)


def _each(options: Options, folder: Path, quick_seeds: int, expert_steps: int) -> Iterator[Rig]:
    shared: Path | None = None
    for seed in range(used_seeds(options, quick_seeds)):
        note(f"seed {seed}: {'the same base' if shared else 'building a base'}")
        source = shared or base(folder, seed, expert_steps)
        shared = source if options.quick else None
        yield Rig(seed, source)


def used_seeds(options: Options, quick_seeds: int) -> int:
    """Return how many seeds this run makes: a quick one is capped."""
    return min(options.seeds, quick_seeds) if options.quick else options.seeds


def rig_settings(options: Options, quick_seeds: int) -> dict[str, Any]:
    """Return the rig's settings, for the document's `settings`."""
    return {
        "base": "tiny",
        "seeds": used_seeds(options, quick_seeds),
        "bases": "one, shared by the seeds" if options.quick else "one a seed",
        "sequence_length": LENGTH,
        "torch_threads": 1,
    }


def everything_else(layers: Mapping[int, Sequence[int]], experts: int = 8) -> dict[int, list[int]]:
    """Return the complement of a selection: with these as helpers the training model equals the full one."""
    return {layer: [e for e in range(experts) if e not in set(chosen)] for layer, chosen in layers.items()}


def mean_loss(model: nn.Module, table: Tokens, batch: int = 16) -> float:
    """Return nats per token of sequences [n, L + 1] under a full model."""
    import torch
    from connito.moe.head import Head

    head, total, device = Head(model), 0.0, next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(table), batch):
            ids = torch.from_numpy(table[start : start + batch].astype(np.int64)).to(device)
            total += float(head.nll(ids[:, :-1], ids[:, 1:]).double().sum())
    return total / (len(table) * (int(table.shape[1]) - 1))


def batched(table: Tokens, size: int) -> Tokens:
    """Return [n, L + 1] -> [n // size, size, L + 1]."""
    return table[: len(table) // size * size].reshape(-1, size, table.shape[1])


def spread(values: Sequence[float], digits: int = 4) -> list[float]:
    """Return [mean, low, high] over seeds, rounded, for `figures`."""
    return [round(value, digits) for value in interval(values)]
