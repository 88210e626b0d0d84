"""Loss that a subset of experts adds to a domain, in a tiny base trained with document pools and in one without.

Both start from the same upcycled model and see the same documents for as many steps. The cost is the rise of the domain's
held-out loss, nats per token, when each layer keeps only the experts that the domain uses most (`connito library extract`).
"""

from __future__ import annotations

import copy
import statistics
from typing import Any

import numpy as np

from bench.compose_setup import text
from bench.harness import Options, Result, interval, main, note
from bench.plots import axes

POOLS, KEPT, EXPERTS, LENGTH = {"document pools of 3": 3, "every token for itself": 8}, (2, 3), 8, 127


def run(options: Options) -> Result:
    """Run both ways on every seed and domain."""
    import torch

    torch.set_num_threads(1)
    steps, seeds = (80, min(options.seeds, 2)) if options.quick else (150, options.seeds)
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        note(f"seed {seed}")
        rows += _round(seed, steps)
    figures: dict[str, Any] = {}
    with axes(options.out / "document_pools.svg") as (axis,):
        shown = {}
        for name in POOLS:
            for kept in KEPT:
                found = interval(_by_seed(rows, name, kept))
                shown[f"{name}, {kept} kept"] = found
                figures[f"cost, {name}, {kept} of {EXPERTS} kept"] = [round(value, 4) for value in found]
            losses = [row["full_loss"] for row in rows if row["way"] == name]
            figures[f"full loss, {name}"] = round(statistics.fmean(losses), 4)
        for kept in KEPT:
            pooled, free = (_by_seed(rows, name, kept) for name in POOLS)
            saved = interval([b - a for a, b in zip(pooled, free, strict=True)])
            figures[f"saved by pools, {kept} of {EXPERTS} kept"] = [round(value, 4) for value in saved]
        axis.bars(shown, "rise of the held-out loss (nats per token)")
    return Result({"steps": steps, "seeds": seeds, "base": "tiny, upcycled", "torch_threads": 1}, rows, figures)


def _round(seed: int, steps: int) -> list[dict[str, Any]]:
    import torch
    from connito.base.emo import train_pooled
    from connito.base.tiny import DOMAINS, blocks, pretrain, tiny_texts
    from connito.base.upcycle import upcycle
    from connito.experts.extraction import extract_domain
    from connito.runtime.progress import silent

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = pretrain(seed, 60, silent)
    texts = {domain: blocks(tiny_texts(domain, seed, 24))[:12] for domain in DOMAINS}
    held = blocks([t for domain in DOMAINS for t in tiny_texts(domain, seed + 1, 2)])
    start = upcycle(dense, texts, held, moe_layers=2, experts=EXPERTS, top_k=2, seed=seed).model
    documents = torch.cat([blocks(tiny_texts(domain, seed + 2000, 160)) for domain in DOMAINS])
    rows = []
    for way, pool in POOLS.items():
        model = copy.deepcopy(start)
        train_pooled(model, documents, pool=pool, steps=steps, seed=seed)
        for domain in DOMAINS:
            probe, apart = text(domain, 16, 5000 + seed, LENGTH), text(domain, 16, 6000 + seed, LENGTH)
            for kept in KEPT:
                found = extract_domain(model, probe, apart, per_layer=kept, accept_loss=True)
                rows.append(
                    {
                        "seed": seed,
                        "way": way,
                        "domain": domain,
                        "kept": kept,
                        "cost": found.cost,
                        "full_loss": found.full_loss,
                    }
                )
    return rows


def _by_seed(rows: list[dict[str, Any]], way: str, kept: int) -> list[float]:
    """Return one value a seed: the mean over domains, which are not repetitions of their own."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row["way"], row["kept"]) == (way, kept):
            found.setdefault(row["seed"], []).append(row["cost"])
    return [float(np.mean(costs)) for costs in found.values()]


if __name__ == "__main__":
    main("document_pools", run, doc=__doc__, seeds=5)
