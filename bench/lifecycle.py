"""Smaller models for one domain: what each way of leaving experts out, or making them smaller, costs in held-out loss.

Tiny base whose experts were trained on all four domains, so that they differ. Calibration and measurement are on
recipes, on different text. `cost` is nats per token above the full model; `random` is the mean of ten random choices.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench.compose_setup import base, text
from bench.harness import Options, Result, main, note

DOMAIN = "recipes"


def run(options: Options) -> Result:
    """Budgets of a half and a quarter of the experts, and one a layer."""
    import torch

    torch.set_num_threads(1)
    count, steps = (6, 40) if options.quick else (24, 160)
    rows: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            note(f"seed {seed}: base")
            source = base(Path(folder), seed, steps)
            note(f"seed {seed}: leaving experts out")
            rows += [{"seed": seed, **row} for row in (*_pruned(source, seed, count), *_smaller(source, seed, count))]
    keys = sorted({row["method"] for row in rows})
    figures: dict[str, Any] = {
        f"cost_{key}": statistics.fmean(r["cost"] for r in rows if r["method"] == key) for key in keys
    }
    figures["full_loss"] = statistics.fmean(row["full"] for row in rows)
    return Result({"domain": DOMAIN, "held_out_sequences": count, "length": 64, "experts": 16}, rows, figures)


def _pruned(source: Path, seed: int, count: int) -> list[dict[str, Any]]:
    from connito.base.loading import load_full
    from connito.moe import prune
    from connito.moe.extraction import extract

    model, probe, held = load_full(source), text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    full, rng, rows = prune.loss(model, held), random.Random(seed), []

    def cost(keep: prune.Keep) -> float:
        with prune.masked(model, keep):
            return prune.loss(model, held) - full

    for budget in (8, 4):
        for method in prune.METHODS:
            keep = prune.choose(model, probe, method, max_experts=budget)
            rows.append({"method": f"{method}_{budget}", "full": full, "cost": cost(keep), "keep": keep})
        draws = [cost({i: sorted(rng.sample(range(8), budget // 2)) for i in (2, 3)}) for _ in range(10)]
        rows.append({"method": f"random_{budget}", "full": full, "cost": statistics.fmean(draws)})
    found = extract(model, probe, held, margin=0.05, accept_loss=True)
    rows.append({"method": "extracted", "full": full, "cost": found.cost, "kept": found.kept, "tried": found.tried})
    betas = prune.skip_thresholds(model, probe[:, :-1])
    with prune.skipping(model, betas) as skipped:
        rows.append({"method": "skipping", "full": full, "cost": prune.loss(model, held) - full})
    rows[-1]["skipped_share"] = skipped.share
    return rows


def _smaller(source: Path, seed: int, count: int) -> list[dict[str, Any]]:
    from connito.base.loading import load_full
    from connito.moe.export import to_dense
    from connito.moe.lowrank import low_rank, sparsify
    from connito.moe.prune import loss, progressive

    probe, held = text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    full, rows = loss(load_full(source), held), []
    sparse, thin, lone = load_full(source), load_full(source), load_full(source)
    sparsify(sparse, probe[:, :-1], 0.5)
    rows.append({"method": "zeros_50", "full": full, "cost": loss(sparse, held) - full})
    factors, _ = low_rank(thin, probe[:, :-1], 0.5)
    numbers = sum(factor.numel() for factor in factors.values())
    rows.append({"method": "low_rank_50", "full": full, "cost": loss(thin, held) - full, "numbers": numbers})
    keep, history = progressive(lone, probe)
    rows.append({"method": "one_expert_dense", "full": full, "cost": loss(to_dense(lone), held) - full, "keep": keep,
                 "history": history})  # fmt: skip
    return rows


if __name__ == "__main__":
    main("lifecycle", run, doc=__doc__)
