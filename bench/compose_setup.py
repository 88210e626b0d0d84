"""Setup of the composition and lifecycle figures: the tiny base, its text, and experts trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def text(domain: str, count: int, seed: int, length: int = 64) -> npt.NDArray[np.int32]:
    """Return `count` sequences [count, length + 1] of a domain of the tiny base."""
    from connito.base.tiny import blocks, tiny_texts

    return np.asarray(blocks(tiny_texts(domain, seed, 4 + count), length + 1).numpy()[:count], dtype=np.int32)


def base(folder: Path, seed: int, steps: int = 0) -> Path:
    """Return the tiny base, built once in a folder; with `steps`, all of its experts trained on all domains, so that they
    differ from one another.
    """
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_full, load_tokenizer
    from connito.base.tiny import DOMAINS, build_tiny
    from connito.moe.rows import write_rows

    plain = folder / f"plain-{seed}"
    if not plain.exists():
        build_tiny(plain, seed=seed)
    if not steps:
        return plain
    everything = {index: list(range(8)) for index in (2, 3)}
    table = np.concatenate([text(domain, steps, 500 + seed) for domain in DOMAINS])
    state = train(plain, everything, table[np.random.default_rng(seed).permutation(len(table))])
    model = load_full(plain)
    write_rows(model, everything, state)
    return save_checkpoint(model, folder / f"base-{seed}", load_tokenizer(plain))


def trained_base(folder: Path, seed: int, steps: int, pool: int = 0) -> Path:
    """Return the tiny base after `steps` batches in which every expert and router learns on all domains.

    `pool` 0 is ordinary training. With a pool, each document may only use the `pool` experts a layer that it is routed to
    most, as in EMO's document-level pools: experts that a document needs then form a group of their own.
    """
    import torch
    from connito.base.checkpoint import save_checkpoint
    from connito.base.loading import load_full, load_tokenizer
    from connito.base.tiny import DOMAINS, build_tiny
    from connito.moe.head import Head
    from connito.moe.layout import require_moe_layers

    plain = folder / f"plain-{seed}"
    if not plain.exists():
        build_tiny(plain, seed=seed)
    model = load_full(plain)
    parameters = [
        parameter
        for layer in require_moe_layers(model).values()
        for module in (layer.experts, layer.router)
        for parameter in module.parameters()
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser, head = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0), Head(model)
    table = np.concatenate([text(domain, steps, 500 + seed) for domain in DOMAINS])
    order = np.random.default_rng(seed).permutation(len(table))
    for batch in table[order].reshape(-1, 4, table.shape[1]):
        ids = torch.from_numpy(batch.astype("int64"))
        optimiser.zero_grad(set_to_none=True)
        for row in ids:
            with pooled(model, pool):
                (head.nll(row[None, :-1], row[None, 1:]).mean() / len(ids)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    return save_checkpoint(model, folder / f"base-{seed}-{pool}", load_tokenizer(plain))


@contextmanager
def pooled(model: Any, pool: int) -> Iterator[None]:
    """Limit every router to the `pool` experts with the most probability on the document, inside the block."""
    import torch
    from connito.moe.layout import require_moe_layers
    from connito.moe.router import choice

    def hook(router: Any, _: Any, output: Any) -> Any:
        logits, weights, _ids = choice(output)
        chances = logits.float().softmax(dim=-1)
        keep = chances.reshape(-1, chances.shape[-1]).mean(dim=0).topk(pool).indices
        inside = torch.zeros(chances.shape[-1], dtype=torch.bool).index_fill(0, keep, True)
        best = chances.masked_fill(~inside, 0.0).topk(weights.shape[-1], dim=-1)
        shares = best.values / best.values.sum(dim=-1, keepdim=True)
        return (logits, shares.to(weights.dtype), best.indices, *output[3:])

    handles = [layer.router.register_forward_hook(hook) for layer in require_moe_layers(model).values()] if pool else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(source: Path, layers: dict[int, list[int]], table: npt.NDArray[np.int32], lr: float = 3e-3) -> Any:
    """Return target rows after one pass over `table` in batches of four."""
    from connito.base.loading import load_full
    from connito.moe.resident import compress
    from connito.moe.training import train_local

    others = {layer: [e for e in range(8) if e not in experts] for layer, experts in layers.items()}
    batches = table[: len(table) // 4 * 4].reshape(-1, 4, table.shape[1])
    state, _ = train_local(compress(load_full(source), layers, others), batches, learning_rate=lr)
    return state


def branches(seed: int, texts: dict[str, npt.NDArray[np.int32]] | Any, lr: float = 1e-3) -> Any:
    """Make BTX on the dense model that the tiny base is made from: one branch a domain, every parameter trained, then joined.

    Returns the MoE, the dense seed, and the branches by domain.
    """
    import copy

    import torch
    from connito.base.branches import import_branches
    from connito.base.tiny import pretrain
    from connito.runtime.progress import silent

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = pretrain(seed, 120, silent)
    specialists = {}
    for domain, table in texts.items():
        model: Any = copy.deepcopy(dense)
        model.requires_grad_(True)
        optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
        for batch in table[: len(table) // 4 * 4].reshape(-1, 4, table.shape[1]):
            ids = torch.from_numpy(batch.astype("int64"))
            loss = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(loss.flatten(0, 1), ids[:, 1:].flatten())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        specialists[domain] = model.requires_grad_(False)
    few = {domain: torch.from_numpy(table[:8, :-1].astype("int64")) for domain, table in texts.items()}
    return import_branches(dense, specialists, few, moe_layers=2, top_k=2), dense, specialists
