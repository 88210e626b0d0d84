"""Effect of each system of the literature on the tiny base, in one small measurement each.

Every expert and router of the base was trained on all four domains. Smaller models are calibrated and measured on recipes, on
different text; `cost` is what they add to the full model's loss, in nats per token. Experts of recipes, logs and poems
are trained apart for what composes them. Each part of a seed is kept in a file of its own, and one that is there is not
measured again; `--only` names parts. `python -m bench.systems_page` renders docs/explanation/systems.md from it.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.compose_setup import branches, text, train, trained_base
from bench.harness import Options, Result, interval, main, note

DOMAIN, DOMAINS = "recipes", ("recipes", "logs", "poems")
Figures = dict[str, float]
Part = Callable[[Path, int, int], Figures]


def run(options: Options) -> Result:
    """Measure the parts that are not there yet, of those that `only` names, and gather all that are."""
    import torch

    torch.set_num_threads(1)
    steps, count = (20, 4) if options.quick else (100, 16)
    kept = options.out / ("systems-quick" if options.quick else "systems-parts")
    kept.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]]
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            wanted = [part for part in PARTS if not options.only or part.__name__[1:] in options.only.split()]
            missing = [part for part in wanted if not _file(kept, seed, part).exists()]
            source = trained_base(Path(folder), seed, steps) if any(part in ON_BASE for part in missing) else Path()
            for part in missing:
                note(f"seed {seed}: {part.__name__[1:]}")
                found = part(source, seed, count).items()
                rows = [{"seed": seed, "figure": name, "value": value} for name, value in found]
                _file(kept, seed, part).write_text(json.dumps(rows))
    files = [_file(kept, seed, part) for seed in range(options.seeds) for part in PARTS]
    rows = [row for path in files if path.exists() for row in json.loads(path.read_text())]
    names = list(dict.fromkeys(row["figure"] for row in rows))
    figures = {
        name: [round(x, 4) for x in interval([row["value"] for row in rows if row["figure"] == name])] for name in names
    }
    return Result(
        {"in_parts": True, "training_batches": steps, "held_out_sequences": count, "length": 64}, rows, figures
    )


def _file(folder: Path, seed: int, part: Part) -> Path:
    return folder / f"{seed}-{part.__name__[1:]}.json"


def _smaller(source: Path, seed: int, count: int) -> Figures:
    from connito.base.loading import load_full
    from connito.experts.choose import choose
    from connito.experts.dense import to_dense
    from connito.experts.lowrank import sparsify
    from connito.experts.measure import loss
    from connito.experts.prune import masked, progressive
    from connito.experts.tuning import distil, tune_for_task

    model, probe, held = load_full(source), text(DOMAIN, count, 600 + seed), text(DOMAIN, count, 900 + seed)
    more, full, found = text(DOMAIN, 64, 300 + seed), loss(model, held), Figures()
    for method in ("naee", "moe-i2"):
        with masked(model, choose(model, probe, method, max_experts=6)):
            found[f"cost {method}"] = loss(model, held) - full
    found |= _low_rank(model, probe, more, held, full)
    plain, tuned = copy.deepcopy(model), copy.deepcopy(model)
    progressive(plain, probe)
    tune_for_task(tuned, probe, more, 40)
    found |= {"cost one expert": loss(plain, held) - full, "cost one expert, tuned": loss(tuned, held) - full}
    found["dense differs"] = abs(loss(to_dense(tuned), held) - loss(tuned, held))
    thin = copy.deepcopy(model)
    sparsify(thin, probe[:, :-1], 0.75)
    found["cost zeros"] = loss(thin, held) - full
    distil(thin, model, more, 16)
    found["cost zeros, distilled"] = loss(thin, held) - full
    return found


def _low_rank(model: Any, probe: Any, more: Any, held: Any, full: float) -> Figures:
    from connito.experts.choose import choose, expert_costs
    from connito.experts.lowrank import low_rank
    from connito.experts.measure import loss
    from connito.experts.prune import prune
    from connito.experts.tuning import recover

    small = prune(copy.deepcopy(model), choose(model, probe, "moe-i2", max_experts=6))
    factors, _ = low_rank(small, probe[:, :-1], 0.5, expert_costs(small, probe))
    found = {"cost moe-i2, low rank": loss(small, held) - full}
    recover(small, factors, more, 16)
    return found | {"cost moe-i2, recovered": loss(small, held) - full}


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
    from connito.base.bam import mix_branches
    from connito.base.branches import train_on, train_routers
    from connito.base.bts import Stitched
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
    mixed = {d: torch.from_numpy(t[:32, :-1].astype("int64")) for d, t in tables.items()}
    whole, stitched = copy.deepcopy(moe), Stitched(dense, specialists)
    train_routers(moe, mixed, 40)
    attention = mix_branches(dense, specialists, mixed, moe_layers=2)
    found |= {"btx routed": before - loss(moe, held), "bts begun": before - loss(stitched, held)}
    train_on(stitched, [*stitched.stitches.parameters()], mixed, 40)
    found |= {"bts": before - loss(stitched, held), "bam begun": before - loss(attention, held)}
    for name, model in {"btx whole": whole, "bam": attention}.items():
        train_on(model, [*model.parameters()], mixed, 40)
        found[name] = before - loss(model, held)
    return found


def _pools(_: Path, seed: int, count: int) -> Figures:
    import torch
    from connito.base.emo import train_pooled
    from connito.base.tiny import DOMAINS as EVERY
    from connito.base.tiny import blocks, tiny_texts
    from connito.experts.extraction import extract_domain

    start = _upcycled(seed, top_k=2)
    documents = torch.cat([blocks(tiny_texts(domain, seed + 2000, 160)) for domain in EVERY])
    found = Figures()
    for way, pool in {"free": 8, "pools": 4}.items():
        model = copy.deepcopy(start)
        train_pooled(model, documents, pool=pool, steps=100, seed=seed, sampled=way == "pools")
        for name, kept in {"25 %": 2, "12.5 %": 1}.items():
            subsets = [
                extract_domain(
                    model, text(d, 8, 5000 + seed), text(d, count, 6000 + seed), per_layer=kept, accept_loss=True
                )
                for d in EVERY
            ]
            found[f"cost {name}, {way}"] = float(np.mean([subset.cost for subset in subsets]))
    return found


def _residual(_: Path, seed: int, count: int) -> Figures:
    from connito.base.residual import as_residual
    from connito.experts.measure import loss
    from connito.experts.tuning import tune_experts

    copies, more = _upcycled(seed, top_k=1), np.concatenate([text(domain, 80, 50 + seed) for domain in DOMAINS])
    more = more[np.random.default_rng(seed).permutation(len(more))]
    held = np.concatenate([text(domain, count, 900 + seed) for domain in DOMAINS])
    before, found = loss(copies, held), Figures()
    for way, model in {"copies": copies, "residual": as_residual(copies)}.items():
        tune_experts(model, more, 60)
        found[f"{way} saved"] = before - loss(model, held)
    return found


def _upcycled(seed: int, top_k: int) -> Any:
    """Return the tiny dense model, of 60 steps, as eight copies a layer."""
    import torch
    from connito.base.tiny import DOMAINS as EVERY
    from connito.base.tiny import blocks, pretrain, tiny_texts
    from connito.base.upcycle import upcycle
    from connito.runtime.progress import silent

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = pretrain(seed, 60, silent)
    texts = {domain: blocks(tiny_texts(domain, seed, 24))[:12] for domain in EVERY}
    held = blocks(tiny_texts("logs", seed + 1, 2))
    return upcycle(dense, texts, held, moe_layers=2, experts=8, top_k=top_k, seed=seed).model


def _miners(source: Path, seed: int, count: int) -> Figures:
    from connito.base.loading import load_full
    from connito.experts.extraction import ranking
    from connito.experts.measure import loss
    from connito.moe.personal import Personal, PersonalRouters
    from connito.moe.resident import compress
    from connito.moe.rows import write_rows
    from connito.moe.statistics import collect
    from connito.moe.training import train_local

    model, held = load_full(source), text(DOMAIN, count, 900 + seed)
    order = ranking(collect(model, text(DOMAIN, 8, 600 + seed)[:, :-1]))
    chosen = {index: sorted(experts[:3]) for index, experts in order.items()}
    others = {index: sorted(experts[3:]) for index, experts in order.items()}
    batches = text(DOMAIN, 80, 50 + seed).reshape(20, 4, -1)
    losses = Figures()
    for way in ("plain", "own", "thin"):
        worker = compress(load_full(source), chosen, others, top_k=1 if way == "thin" else 0)
        own = PersonalRouters(worker, Personal(0.1)) if way == "own" else None
        state, _ = train_local(worker, batches, learning_rate=3e-3, beside=own)
        write_rows(model, chosen, state)
        losses[way] = loss(model, held)
    return {
        "miner saved": loss(load_full(source), held) - losses["plain"],
        "own router saved": losses["plain"] - losses["own"],
        "cost one expert a token": losses["thin"] - losses["plain"],
    }


def _clients(source: Path, seed: int, count: int) -> Figures:
    """FFT-MoE: clients of one domain and 1, 2 or 2 experts a token merge experts in 4 cycles of 10 steps, and use their own."""
    import torch
    from connito.base.loading import load_full
    from connito.experts.measure import loss
    from connito.moe.personal import Personal, PersonalRouters
    from connito.moe.resident import compress, read_targets, write_targets
    from connito.moe.training import train_local

    everything, found = {index: list(range(8)) for index in (2, 3)}, Figures()
    for way in ("shipped", "own"):
        clients = [compress(load_full(source), everything, top_k=k) for k in (1, 2, 2)]
        tables = [text(domain, count, 900 + seed) for domain in DOMAINS]
        begun = float(np.mean([loss(client, table) for client, table in zip(clients, tables, strict=True)]))
        settings = Personal(0.01, 1.0)
        routers = [PersonalRouters(client, settings) if way == "own" else None for client in clients]
        state = read_targets(clients[0])
        for cycle in range(4):
            states = []
            for client, domain, own in zip(clients, DOMAINS, routers, strict=True):
                write_targets(client, state)
                batches = text(domain, 160, 50 + seed)[40 * cycle : 40 * cycle + 40].reshape(10, 4, -1)
                states.append(train_local(client, batches, learning_rate=3e-3, beside=own)[0])
            state = {name: torch.stack([each[name] for each in states]).mean(dim=0) for name in state}
        losses = []
        for client, table in zip(clients, tables, strict=True):
            write_targets(client, state)
            losses.append(loss(client, table))
        found[f"clients {way}"] = begun - float(np.mean(losses))
    return {**found, "clients gain": found["clients own"] - found["clients shipped"]}


def _domains(source: Path, seed: int, count: int) -> Figures:
    """DES-MoE beside training all experts and routers: what three domains gain, and what the fourth loses."""
    import torch
    from connito.base.loading import load_full
    from connito.experts.des_moe import Phases, adapt, fold, routed_by
    from connito.experts.measure import loss

    texts = {domain: torch.from_numpy(text(domain, 80, 50 + seed)) for domain in DOMAINS}
    held = {domain: text(domain, count, 900 + seed) for domain in (*DOMAINS, "ledgers")}
    start, found = load_full(source), Figures()
    before = {domain: loss(start, table) for domain, table in held.items()}

    def change(model: Any, domains: tuple[str, ...]) -> float:
        return float(np.mean([before[domain] - loss(model, held[domain]) for domain in domains]))

    for way, phases in {"des-moe": Phases(), "everything": Phases(1.0, 1.0, 0.0)}.items():
        model = copy.deepcopy(start)
        adapted = adapt(model, texts, 60, phases=phases, seed=seed)
        with routed_by(model, adapted.routers):
            found |= {f"{way} saved": change(model, DOMAINS), f"{way} forgot": -change(model, ("ledgers",))}
        if way == "des-moe":
            folded = fold(model, adapted, torch.cat([*texts.values()])[:64, :-1])
            found["folding costs"] = found["des-moe saved"] - change(folded, DOMAINS)
    return {**found, "kept from forgetting": found["everything forgot"] - found["des-moe forgot"]}


# Those that need the base with trained experts, and all.
ON_BASE: tuple[Part, ...] = (_smaller, _running, _beside, _groups, _miners, _clients, _domains)
PARTS: tuple[Part, ...] = (*ON_BASE, _weights, _branches, _pools, _residual)

if __name__ == "__main__":
    main("systems", run, doc=__doc__, seeds=5)
