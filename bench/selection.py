"""Is it the right experts? Selected ones against random, the least used and all of them, at equal bytes.

Tiny base. As many experts per layer each, the same batches and steps, everything else resident as helpers, so that
only the choice differs. `all` trains every expert and uploads so many times as much; `all at equal bytes` has the
same upload budget and therefore that many times fewer steps. Gains are falls of the held-out loss of the full
model, nats per token, on the mean of two domains in turn; `elsewhere` is the change of the other domains' loss,
positive is worse.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from bench.harness import Options, Result, interval, main, note
from bench.plots import axes
from bench.tiny_rig import Rig, batched, everything_else, mean_loss, rig_settings, rigs, spread
from bench.training_methods import Loop, expert_only

TARGETS = ("recipes", "poems")
DOMAINS = ("recipes", "logs", "poems", "ledgers")
EXPERTS, PER_LAYER, RATE, BATCH, QUICK_SEEDS = 8, 2, 3e-3, 8, 3
# Steps between two uploads.
EVERY = 4


def run(options: Options) -> Result:
    """Measure every choice on both domains and every seed; `random` is the mean of several draws."""
    steps, held, draws = (16, 16, 2) if options.quick else (64, 48, 6)
    rows: list[dict[str, Any]] = []
    with rigs(options, quick_seeds=QUICK_SEEDS, expert_steps=40) as each:
        for rig in each:
            for target in TARGETS:
                note(f"seed {rig.seed}: {target}")
                rows += _round(rig, target, steps, held, draws)
    choices = list(dict.fromkeys(row["choice"] for row in rows))
    gains = {choice: interval(_by_seed(rows, choice, "gain")) for choice in choices}
    with axes(options.out / "selection.svg") as (axis,):
        axis.bars(gains, "fall of the target loss (nats per token)")
    figures: dict[str, Any] = {}
    for choice in choices:
        key = choice.replace(" ", "_")
        figures[f"gain_{key}"] = spread(_by_seed(rows, choice, "gain"))
        figures[f"elsewhere_{key}"] = spread(_by_seed(rows, choice, "elsewhere"))
        figures[f"bytes_{key}"] = next(row["upload_bytes"] for row in rows if row["choice"] == choice)
    for other in ("random", "least used", "all at equal bytes"):
        pairs = zip(_by_seed(rows, "selected", "gain"), _by_seed(rows, other, "gain"), strict=True)
        figures[f"selected_over_{other.replace(' ', '_')}"] = spread([a - b for a, b in pairs])
    settings = {
        "targets": TARGETS,
        "experts_per_layer": f"{PER_LAYER} of {EXPERTS}",
        "steps": steps,
        "steps_per_upload": EVERY,
        "batch_sequences": BATCH,
        "learning_rate": RATE,
        "random_draws": draws,
        "held_out_sequences": held,
        **rig_settings(options, QUICK_SEEDS),
    }
    return Result(settings, rows, figures)


def _round(rig: Rig, target: str, steps: int, held: int, draws: int) -> list[dict[str, Any]]:
    from connito.moe.statistics import collect

    tables = {domain: rig.held(domain, held) for domain in DOMAINS}
    model = rig.model()
    before = {domain: mean_loss(model, table) for domain, table in tables.items()}
    usage = {index: layer.token_score for index, layer in collect(model, rig.probe([target], 8)[:, :-1]).layers.items()}
    order = {index: [int(e) for e in np.argsort(-score, kind="stable")] for index, score in usage.items()}
    every = {index: list(range(EXPERTS)) for index in order}
    rng = np.random.default_rng(rig.seed)
    choices: list[tuple[str, dict[int, list[int]], int]] = [
        ("selected", {index: found[:PER_LAYER] for index, found in order.items()}, steps),
        ("least used", {index: found[-PER_LAYER:] for index, found in order.items()}, steps),
        ("all", every, steps),
        ("all at equal bytes", every, max(1, steps * PER_LAYER // EXPERTS)),
    ]
    choices += [
        ("random", {index: sorted(rng.choice(EXPERTS, PER_LAYER, replace=False).tolist()) for index in order}, steps)
        for _ in range(draws)
    ]
    batches = batched(rig.train(target, steps * BATCH), BATCH)
    rows = []
    for choice, layers, number in choices:
        job = expert_only(rig.model, layers, everything_else(layers, EXPERTS))
        loop = Loop(job, RATE)
        for batch in batches[:number]:
            loop.step(batch)
        whole = job.full()
        after = {domain: mean_loss(whole, table) for domain, table in tables.items()}
        rows.append(
            {
                "seed": rig.seed,
                "target": target,
                "choice": choice,
                "experts": {index: sorted(experts) for index, experts in layers.items()},
                "mass": statistics.fmean(float(usage[index][experts].sum()) for index, experts in layers.items()),
                "steps": number,
                "upload_bytes": job.upload() * number // EVERY,
                "gain": before[target] - after[target],
                "elsewhere": statistics.fmean(after[d] - before[d] for d in DOMAINS if d != target),
            }
        )
    return rows


def _by_seed(rows: list[dict[str, Any]], choice: str, key: str) -> list[float]:
    """Return one value per seed: the mean over targets and draws, which are not repetitions of their own."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["choice"] == choice:
            found.setdefault(row["seed"], []).append(row[key])
    return [statistics.fmean(values) for values in found.values()]


if __name__ == "__main__":
    main("selection", run, doc=__doc__, seeds=5)
