"""Effect of each system of the literature on the tiny base, in one small measurement each.

Every expert and router of the base was trained on all four domains. Smaller models are calibrated and measured on recipes, on
different text; `cost` is what they add to the full model's loss, in nats per token. Experts of recipes, logs and poems
are trained apart for what composes them. `python -m bench.systems_page` renders docs/explanation/systems.md from it.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.compose_setup import branches, text, train, trained_base
from bench.harness import Options, Result, interval, main, note

DOMAIN, DOMAINS = "recipes", ("recipes", "logs", "poems")
Figures = dict[str, float]


def run(options: Options) -> Result:
    """Measure every system once a seed."""
    import torch

    torch.set_num_threads(1)
    steps, count = (20, 4) if options.quick else (100, 16)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            note(f"seed {seed}: base")
            source = trained_base(Path(folder), seed, steps)
            for part in (_smaller, _running, _weights, _beside, _groups, _branches):
                note(f"seed {seed}: {part.__name__[1:]}")
                rows += [{"seed": seed, "figure": name, "value": x} for name, x in part(source, seed, count).items()]
    names = list(dict.fromkeys(row["figure"] for row in rows))
    figures = {
        name: [round(x, 4) for x in interval([row["value"] for row in rows if row["figure"] == name])] for name in names
    }
    return Result({"training_batches": steps, "held_out_sequences": count, "length": 64}, rows, figures)


def _smaller(source: Path, seed: int, count: int) -> Figures:
    from connito.base.loading import load_full
    from connito.experts.choose import choose
    from connito.experts.lowrank import sparsify
    from connito.experts.measure import loss
    from connito.experts.prune import masked, progressive
    from connito.experts.tuning import distil, tune_experts

    model, probe, held = load_full(source), text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    more, full, found = text(DOMAIN, 64, 300 + seed), loss(model, held), Figures()
    for method in ("naee", "moe-i2"):
        with masked(model, choose(model, probe, method, max_experts=6)):
            found[f"cost {method}"] = loss(model, held) - full
    plain, tuned = copy.deepcopy(model), copy.deepcopy(model)
    progressive(plain, probe)
    progressive(tuned, probe, tune=lambda small: tune_experts(small, more, 4))
    found |= {"cost one expert": loss(plain, held) - full, "cost one expert, tuned": loss(tuned, held) - full}
    thin = copy.deepcopy(model)
    sparsify(thin, probe[:, :-1], 0.75)
    found["cost zeros"] = loss(thin, held) - full
    distil(thin, model, more, 16)
    found["cost zeros, distilled"] = loss(thin, held) - full
    return found


def _running(source: Path, seed: int, count: int) -> Figures:
    from connito.base.loading import load_full
    from connito.experts.measure import loss
    from connito.experts.steering import steer_drivers
    from connito.experts.token_skipping import experts_choose, skip_thresholds, skipping
    from connito.moe.diagnostics import top1_ratio
    from connito.moe.lens import early_decoding

    model, probe, held = load_full(source), text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    full = loss(model, held)
    with skipping(model, skip_thresholds(model, probe[:, :-1])) as skipped:
        found = {"cost skipping": loss(model, held) - full}
    found["skipped"] = skipped.share
    with experts_choose(model, 2.0):
        found["cost expert choice"] = loss(model, held) - full
    steered = steer_drivers(model, probe, held, count=4)
    found |= {"cost steering": steered.loss - steered.full, "factor": steered.factor}
    lens = early_decoding(model, held[:4, :-1])
    return found | {
        "lens agreement": float(np.mean([row["agreement"] for row in lens.values()])),
        "lens cosine": float(np.mean([row["cosine"] for row in lens.values()])),
        "top-1 ratio": top1_ratio(model, held),
    }


def _weights(_: Path, seed: int, __: int) -> Figures:
    from connito.experts.lorahub import learn_weights

    rng = np.random.default_rng(seed)
    best, mixed = rng.uniform(-1, 1, 20), rng.normal(size=(20, 20))
    shape, names = mixed @ mixed.T / 20 + 0.3 * np.eye(20), [str(n) for n in range(20)]

    def bowl(weights: dict[str, float]) -> float:
        away = np.array([weights[name] for name in names]) - best
        return float(away @ shape @ away)

    learned = learn_weights(names, bowl, l1=0.0)
    return {"lorahub": 1 - learned.loss / min(learned.losses.values())}


def _beside(source: Path, seed: int, count: int) -> Figures:
    import torch
    from connito.base.branches import train_routers
    from connito.base.loading import load_full
    from connito.base.tiny import DOMAINS as EVERY
    from connito.experts.flex import grow, opt_in
    from connito.experts.measure import loss

    model = load_full(source)
    public = np.concatenate([text(domain, 4, 800 + seed)[:, :-1] for domain in EVERY])
    held = {domain: text(domain, count, 900 + seed) for domain in DOMAINS}
    before = {domain: loss(model, table) for domain, table in held.items()}
    made = [
        grow(model, d, text(d, 80, 50 + seed).reshape(20, 4, -1), public, learning_rate=3e-3) for d in DOMAINS
    ]  # fmt: skip
    opt_in(model, made)
    joined = {domain: loss(model, table) for domain, table in held.items()}
    few = {domain: torch.from_numpy(text(domain, 8, 700 + seed)[:, :-1].astype("int64")) for domain in DOMAINS}
    train_routers(model, few, 20)
    routed = np.mean([loss(model, table) for table in held.values()])
    return {
        "flex saved": float(np.mean([before[d] - joined[d] for d in DOMAINS])),
        "router training": float(routed - np.mean(list(joined.values()))),
    }


def _groups(source: Path, seed: int, count: int) -> Figures:
    from connito.base.loading import load_full
    from connito.experts.compose import Part, Recipe, base_rows, layers_of, merge, rows_of, state_of
    from connito.experts.extraction import ranking
    from connito.experts.mbc import cluster, train_cluster
    from connito.experts.measure import loss
    from connito.moe.rows import write_rows
    from connito.moe.statistics import collect

    model, parts, texts = load_full(source), [], {}
    for number, domain in enumerate(DOMAINS):
        texts[domain] = text(domain, 80, 50 + seed)
        order = ranking(collect(model, text(domain, 8, 600 + seed)[:, :-1]))
        layers = {index: sorted(experts[:3]) for index, experts in order.items()}
        parts.append(Part(domain, str(number) * 64, rows_of(layers, train(source, layers, texts[domain]))))
    origin = base_rows(model, parts)
    found = Figures()
    for way in ("merged", "trained"):
        losses = []
        for group in cluster(parts, origin, 2):
            members = [parts[i] for i in group]
            tables = [texts[part.name] for part in members]
            mean = way == "merged"
            rows = (
                merge(members, origin, Recipe("linear"))
                if mean
                else train_cluster(model, members, tables, 20 * len(group), 3e-3)
            )
            write_rows(model, layers_of(rows), state_of(rows))
            losses += [loss(model, text(part.name, count, 900 + seed)) for part in members]
            write_rows(model, layers_of(rows), state_of({key: origin[key] for key in rows}))
        found[f"mbc {way}"] = float(np.mean(losses))
    return {**found, "mbc gain": found["mbc merged"] - found["mbc trained"]}


def _branches(_: Path, seed: int, count: int) -> Figures:
    import torch
    from connito.base import btm
    from connito.base.branches import train_routers
    from connito.experts.measure import loss

    tables = {domain: text(domain, 120, 50 + seed) for domain in DOMAINS}
    moe, dense, specialists = branches(seed, tables)
    held = np.concatenate([text(domain, count, 900 + seed) for domain in DOMAINS])
    models = list(specialists.values())
    even = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
    log_p = btm.log_likelihoods(models, torch.from_numpy(held.astype("int64")))
    merged = btm.average(specialists, even.tolist())
    before = loss(dense, held)
    found = {
        "btm ensemble": before - float(btm.ensemble_nll(log_p, even).mean()),
        "btm mean": before - loss(merged, held),
        "btx joined": before - loss(moe, held),
    }
    train_routers(moe, {d: torch.from_numpy(t[:32, :-1].astype("int64")) for d, t in tables.items()}, 40)
    return {**found, "btx routed": before - loss(moe, held)}


if __name__ == "__main__":
    main("systems", run, doc=__doc__, seeds=5)
