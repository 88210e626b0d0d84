"""What the composition and lifecycle figures stand on: the tiny base, its text, and experts trained on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def text(domain: str, count: int, seed: int, length: int = 64) -> npt.NDArray[np.int32]:
    """`count` sequences [count, length + 1] of a domain of the tiny base."""
    from connito.base.tiny import blocks, tiny_texts

    return np.asarray(blocks(tiny_texts(domain, seed, 4 + count), length + 1).numpy()[:count], dtype=np.int32)


def base(folder: Path, seed: int, steps: int = 0) -> Path:
    """The tiny base; with `steps`, all of its experts trained on all domains, so that they differ from one another."""
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_full, load_tokenizer
    from connito.base.tiny import DOMAINS, build_tiny
    from connito.moe.insert import write_rows

    plain = build_tiny(folder / f"plain-{seed}", seed=seed)
    if not steps:
        return plain
    everything = {index: list(range(8)) for index in (2, 3)}
    table = np.concatenate([text(domain, steps, 500 + seed) for domain in DOMAINS])
    state = train(plain, everything, table[np.random.default_rng(seed).permutation(len(table))])
    model = load_full(plain)
    write_rows(model, everything, state)
    return save_checkpoint(model, folder / f"base-{seed}", load_tokenizer(plain))


def train(source: Path, layers: dict[int, list[int]], table: npt.NDArray[np.int32], lr: float = 3e-3) -> Any:
    """Target rows after one pass over `table` in batches of four."""
    from connito.base.loading import load_full
    from connito.moe.resident import compress
    from connito.moe.training import train_local

    others = {layer: [e for e in range(8) if e not in experts] for layer, experts in layers.items()}
    batches = table[: len(table) // 4 * 4].reshape(-1, 4, table.shape[1])
    state, _ = train_local(compress(load_full(source), layers, others), batches, learning_rate=lr)
    return state
