"""Cost of a domain's gain elsewhere: target loss against general loss of expert-only training, full fine-tuning and
LoRA, over learning rates and replay shares.

Tiny base whose experts were trained on all four of its domains. Target: recipes. General: the mean of the other
three. Every method sees the same batches; replay replaces a share of each batch's sequences by general ones, so the
tokens are equal. Losses are of the full model on held-out text, nats per token. The frontier is drawn through the
settings that no other setting of the method beats in both losses.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.harness import Options, Result, main, note
from bench.plots import axes
from bench.tiny_rig import Rig, Tokens, batched, mean_loss, rig_settings, rigs, spread
from bench.training_methods import Job, Loop, expert_only, full_fine_tuning, lora

if TYPE_CHECKING:
    from connito.moe.selection import Selection

TARGET, GENERAL = "recipes", ("logs", "poems", "ledgers")
RATES = {
    "expert-only": (1e-3, 3e-3, 1e-2, 2e-2),
    "full fine-tuning": (1e-4, 3e-4, 1e-3, 3e-3),
    "LoRA": (3e-3, 1e-2, 3e-2, 1e-1),
}
QUICK_RATES = {"expert-only": (3e-3, 1e-2), "full fine-tuning": (3e-4, 2e-3), "LoRA": (1e-2, 3e-2)}
BATCH, RANK, PER_LAYER, QUICK_SEEDS = 8, 4, 2, 3
# A general loss that rose by less than this, in nats per token, counts as kept.
MARGIN = 0.01


def run(options: Options) -> Result:
    """Run every method at every learning rate and replay share, on every seed."""
    steps, held = (16, 16) if options.quick else (100, 48)
    rates = QUICK_RATES if options.quick else RATES
    shares = (0.0, 0.25) if options.quick else (0.0, 0.125, 0.25, 0.5)
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS, expert_steps=40) as each:
        for rig in each:
            rows += _round(rig, steps, held, rates, shares)
    points = _points(rows)
    _plot(points, options.out / "forgetting.svg")
    settings = {
        "steps": steps,
        "batch_sequences": BATCH,
        "lora_rank": RANK,
        "experts_selected": f"{PER_LAYER} of 8 in each of 2 layers",
        "held_out_sequences": held,
        "margin": MARGIN,
        **rig_settings(options, QUICK_SEEDS),
    }
    return Result(settings, rows, _figures(points))


def _round(rig: Rig, steps: int, held: int, rates: Any, shares: Any) -> list[dict[str, Any]]:
    tables = {domain: rig.held(domain, held) for domain in (TARGET, *GENERAL)}
    before, selection = _losses(rig.model(), tables), rig.select([TARGET], PER_LAYER)
    rows = []
    for share in shares:
        batches = _batches(rig, steps, share)
        for method, lrs in rates.items():
            note(f"seed {rig.seed}: {method}, replay {share}")
            for lr in lrs:
                job = _job(rig, method, selection)
                loop = Loop(job, lr)
                for batch in batches:
                    loop.step(batch)
                after = _losses(job.full(), tables)
                rows.append(
                    {
                        "seed": rig.seed,
                        "method": method,
                        "learning_rate": lr,
                        "replay": share,
                        "target_change": after[TARGET] - before[TARGET],
                        "general_change": statistics.fmean(after[d] - before[d] for d in GENERAL),
                        "before": before,
                        "after": after,
                    }
                )
    return rows


def _job(rig: Rig, method: str, selection: Selection) -> Job:
    if method == "full fine-tuning":
        return full_fine_tuning(rig.model)
    if method == "LoRA":
        return lora(rig.model, RANK)
    return expert_only(rig.model, selection.layers, selection.helpers)


def _batches(rig: Rig, steps: int, share: float) -> Tokens:
    """Return [steps, BATCH, L + 1]: the first sequences of a batch are replayed general text."""
    general = round(BATCH * share)
    target = batched(rig.train(TARGET, steps * BATCH), BATCH)
    if not general:
        return target
    mixed = np.concatenate([rig.train(domain, steps * general) for domain in GENERAL])
    mixed = mixed[np.random.default_rng(rig.seed).permutation(len(mixed))][: steps * general]
    return np.concatenate([mixed.reshape(steps, general, -1), target[:, general:]], axis=1)


def _losses(model: Any, tables: dict[str, Tokens]) -> dict[str, float]:
    return {domain: mean_loss(model, table) for domain, table in tables.items()}


def _points(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return, by method, one point per setting, with [mean, low, high] of both changes over seeds."""
    groups: dict[tuple[str, float, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["learning_rate"], row["replay"]), []).append(row)
    points: dict[str, list[dict[str, Any]]] = {}
    for (method, lr, share), group in groups.items():
        target, general = (spread([row[key] for row in group]) for key in ("target_change", "general_change"))
        points.setdefault(method, []).append(
            {"learning_rate": lr, "replay": share, "target": target, "general": general}
        )
    return points


def frontier(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the points that no other one beats in both mean losses, by falling general loss."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["general"][0], p["target"][0])):
        if not best or point["target"][0] < best[-1]["target"][0]:
            best.append(point)
    return best


def _figures(points: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for method, group in points.items():
        key = method.replace(" ", "_")
        kept = [point for point in group if point["general"][0] <= MARGIN]
        figures[f"{key}_lowest_target"] = min(group, key=lambda point: point["target"][0])
        figures[f"{key}_lowest_target_general_kept"] = min(kept, key=lambda p: p["target"][0]) if kept else None
        figures[f"{key}_worst_general"] = max(point["general"][0] for point in group)
        figures[f"{key}_frontier"] = [[p["general"][0], p["target"][0]] for p in frontier(group)]
    return figures


def _plot(points: dict[str, list[dict[str, Any]]], path: Path) -> None:
    with axes(path) as (axis,):
        for (method, group), colour in zip(points.items(), ("#2f6f4f", "#a63d40", "#5b7fa6"), strict=False):
            for point in group:
                axis.estimate(point["general"], point["target"], colour, filled=not point["replay"])
            axis.line([(p["general"][0], p["target"][0]) for p in frontier(group)], colour, method)
        axis.upright(0)
        axis.x_linear = 0.05
        axis.x_label = "change of general loss (nats per token)"
        axis.y_label = "change of target loss (nats per token)"


if __name__ == "__main__":
    main("forgetting", run, doc=__doc__, seeds=5)
