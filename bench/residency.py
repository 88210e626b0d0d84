"""Comparison of what a miner keeps of the frozen experts: a few helpers, one background expert, or all of them in four bits.

Three parts. *Formats*: bytes, error and time of libraries that pack weights in four bits, on an expert of DeepSeek-V2-Lite's
shape. *Traces*: on its authors' published routing of two domains, the share of slots whose expert is not resident, with as
many helpers as fit into so many bytes; no model is run. *Base*: a tiny base of 32 experts that learnt apart, top-4; `strayed`
is KL(full model || training model) on held-out text before any training, `moved` the share of slots that go to another
expert than in the full model, `kept` the share of the gain that training with every expert resident has, after inserting the
rows into the full model. Bytes are of the frozen experts of adapted layers, as bfloat16 where they are not in four bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.compose_setup import text
from bench.evidence import ROOT
from bench.harness import Options, Result, interval, main, note
from bench.plots import axes
from bench.routing_modes import divergence
from bench.tiny_rig import HELD_OFFSET, PROBE_OFFSET, TRAIN_OFFSET, Tokens, batched, mean_loss, spread

TRACES = Path(os.environ.get("CONNITO_TEST_DATA", ROOT.parent / "shared/data")) / "esft-traces"
TASKS, THRESHOLD, OF_TRACES = ("law", "translation"), 0.2, 64
# One expert of DeepSeek-V2-Lite: gate and up, down.
EXPERT_SHAPES = ((2 * 1408, 2048), (2048, 1408))
TARGET, GENERAL = "recipes", ("logs", "poems", "ledgers")
EXPERTS, TOP_K, SELECTED, HELD_LENGTH, BATCH, RATE = 32, 4, 2, 64, 8, 3e-3
HELPER_COUNTS = (2, 8, 16)
ARMS = ("all", "four bits", *(f"{count} helpers" for count in HELPER_COUNTS), "background", "2 helpers + background")


def run(options: Options) -> Result:
    """Measure all three parts."""
    import torch

    torch.set_num_threads(1)
    steps, seeds, taught = (24, 1, 80) if options.quick else (48, options.seeds, 100)
    rows = [{"part": "formats", **row} for row in formats()]
    if TRACES.exists():
        rows += [{"part": "traces", **row} for task in TASKS for row in traces(task)]
    else:
        note(f"NOT MEASURED: the published routing traces are not at {TRACES}; set CONNITO_TEST_DATA")
    for seed in range(seeds):
        note(f"seed {seed}: building a base whose experts differ, then training with {len(ARMS)} residencies")
        rows += [{"part": "base", **row} for row in on_a_base(seed, taught, steps)]
    _draw(options, rows)
    settings = {
        "seeds": seeds,
        "steps": steps,
        "base_steps": taught,
        "experts": f"{SELECTED} of {EXPERTS} trained in each of 2 layers, top-{TOP_K}",
        "traces": list(TASKS) if TRACES.exists() else [],
        "torch_threads": 1,
    }
    return Result(settings, rows, _figures(rows))


def formats() -> list[dict[str, Any]]:
    """Return bits a weight, relative error, and milliseconds to unpack, by library: an expert of DeepSeek-V2-Lite, bfloat16."""
    import torch
    from connito.moe.four_bit import FourBit

    draw = torch.Generator().manual_seed(0)
    weights = [(torch.randn(shape, generator=draw) * 0.02).bfloat16() for shape in EXPERT_SHAPES]

    def ours(weight: torch.Tensor) -> tuple[Callable[[], torch.Tensor], int]:
        bank = FourBit(1, weight.shape, weight.dtype)
        bank.put(0, weight)
        return lambda: bank.row(0), sum(buffer.nbytes for buffer in bank.buffers())

    ways = {"NF4, bitsandbytes": ours, **_torchao()}
    rows = []
    for name, pack in ways.items():
        packed = [pack(weight) for weight in weights]
        wrong = sum(float((back() - w).float().square().sum()) for (back, _), w in zip(packed, weights, strict=True))
        norm = sum(float(w.float().square().sum()) for w in weights)
        rows.append(
            {
                "format": name,
                "bits": 8 * sum(size for _, size in packed) / sum(w.numel() for w in weights),
                "error": (wrong / norm) ** 0.5,
                "unpack_ms": sum(_fastest(back) for back, _ in packed),
                "product_ms": sum(_fastest(_product(weight)) for weight in weights),
            }
        )
    return rows


def _torchao() -> dict[str, Any]:
    """Return torchao's four-bit weights that run on a processor, by name; nothing where it is not installed."""
    import torch

    try:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    except ImportError:
        note("NOT MEASURED: torchao is not installed (pip install torchao)")
        return {}

    def size(tensor: Any, names: tuple[str, ...]) -> int:
        return sum(getattr(tensor, name).nbytes for name in names)

    def nf4(weight: torch.Tensor) -> tuple[Callable[[], torch.Tensor], int]:
        packed = to_nf4(weight, 64, 256)
        parts = ("quantized_data", "quantized_scalers", "quantization_factor")
        return packed.get_original_weight, size(packed, parts)

    def integers(weight: torch.Tensor) -> tuple[Callable[[], torch.Tensor], int]:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        layer.weight.data.copy_(weight)
        quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))  # type: ignore[attr-defined]
        held: Any = layer.weight
        return held.dequantize, size(held, ("qdata", "scale", "zero_point"))

    return {"NF4, torchao": nf4, "int4 by group of 64, torchao": integers}


def _product(weight: Any) -> Callable[[], Any]:
    import torch

    x = torch.zeros(64, weight.shape[1], dtype=weight.dtype)
    return lambda: torch.nn.functional.linear(x, weight)


def _fastest(work: Callable[[], Any], times: int = 5) -> float:
    """Return the shortest of some runs, in milliseconds, after one that warms up."""
    taken = []
    for _ in range(times + 1):
        begun = time.perf_counter()
        work()
        taken.append(1e3 * (time.perf_counter() - begun))
    return min(taken[1:])


def traces(task: str) -> list[dict[str, Any]]:
    """Return, by number of helpers, the share of slots on experts that are not resident, and of tokens that keep less than
    half of theirs.
    """
    from connito.moe.selection import choose_helpers, select_experts
    from connito.moe.statistics import read_trace

    path = TRACES / f"{task}.npz"
    statistics = read_trace(path, num_experts=OF_TRACES)
    targets = select_experts(statistics, "esft-token", THRESHOLD).layers
    with np.load(path) as archive:
        ids = {layer: archive[f"layer_{layer}_ids"] for layer in targets}
    packed = four_bit_experts(OF_TRACES - float(np.mean([len(experts) for experts in targets.values()])))
    rows = []
    for count in (0, *HELPER_COUNTS, round(packed), 32, OF_TRACES):
        helpers = choose_helpers(statistics, targets, count)
        absent = [~np.isin(chosen, [*targets[layer], *helpers.get(layer, [])]) for layer, chosen in sorted(ids.items())]
        rows.append(
            {
                "task": task,
                "helpers": count,
                "moved": float(np.mean([part.mean() for part in absent])),
                "tokens_mostly_moved": float(np.mean([(part.mean(axis=1) > 0.5).mean() for part in absent])),
                "four_bit_experts": packed,
            }
        )
    return rows


def four_bit_experts(count: float) -> float:
    """Return how many experts in bfloat16 weigh as much as `count` in four bits."""
    import torch
    from connito.moe.four_bit import FourBit

    packed = [buffer for shape in EXPERT_SHAPES for buffer in FourBit(1, shape, torch.bfloat16).buffers()]
    return count * sum(buffer.nbytes for buffer in packed) / (2 * sum(a * b for a, b in EXPERT_SHAPES))


def on_a_base(seed: int, taught: int, steps: int) -> list[dict[str, Any]]:
    """Return one row a residency, all trained on the same batches from the same base."""
    import copy

    from connito.moe.background import background
    from connito.moe.budget import Budget
    from connito.moe.residency import ALL, FOUR_BIT, HELPERS
    from connito.moe.resident import compress
    from connito.moe.rows import write_rows
    from connito.moe.selection import choose_helpers, select_experts
    from connito.moe.statistics import collect
    from connito.moe.training import train_local

    base = diverged(seed, taught)
    statistics = collect(copy.deepcopy(base), text(TARGET, 16, PROBE_OFFSET + seed, HELD_LENGTH)[:, :-1])
    chosen = select_experts(statistics, "esft-token", 1.0, budget=Budget(SELECTED, scope="layer"), domain="target")
    usage = {index: layer.token_score for index, layer in statistics.layers.items()}
    held = text(TARGET, 48, HELD_OFFSET + seed, HELD_LENGTH)
    batches = batched(text(TARGET, steps * BATCH, TRAIN_OFFSET + seed, HELD_LENGTH), BATCH)
    before = mean_loss(base, held)
    rows = []
    for arm in ARMS:
        residency = {"all": ALL, "four bits": FOUR_BIT}.get(arm, HELPERS)
        helpers = choose_helpers(statistics, chosen.layers, int(arm.split()[0]) if "helpers" in arm else 0)
        merged = background(copy.deepcopy(base), chosen, helpers, usage) if "background" in arm else None
        worker = compress(copy.deepcopy(base), chosen, helpers, background=merged, residency=residency)
        row = {"seed": seed, "arm": arm, "before": before, "bytes": frozen_bytes(worker)}
        row |= {"strayed": divergence(base, worker, held), "moved": moved_slots(base, worker, held)}
        state, _ = train_local(worker, batches, learning_rate=RATE)
        full = copy.deepcopy(base)
        write_rows(full, chosen, state)
        rows.append({**row, "gain": before - mean_loss(full, held)})
    return rows


def diverged(seed: int, steps: int) -> Any:
    """Return a model of `EXPERTS` experts a layer, trained on all domains until they differ."""
    import torch
    from connito.base.emo import train_pooled
    from connito.base.tiny import DOMAINS, blocks, pretrain, tiny_texts
    from connito.base.upcycle import upcycle
    from connito.runtime.progress import silent

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dense = pretrain(seed, 60, silent)
    texts = {domain: blocks(tiny_texts(domain, seed, 24))[:12] for domain in DOMAINS}
    held = blocks([t for domain in DOMAINS for t in tiny_texts(domain, seed + 1, 2)])
    model = upcycle(dense, texts, held, moe_layers=2, experts=EXPERTS, top_k=TOP_K, seed=seed).model
    documents = torch.cat([blocks(tiny_texts(domain, seed + 2000, 160)) for domain in DOMAINS])
    train_pooled(model, documents, pool=EXPERTS, steps=steps, seed=seed)
    return model


def frozen_bytes(model: Any) -> int:
    """Return bytes of the frozen experts of adapted layers: what is in four bits as it is, the rest at two bytes a number."""
    from connito.moe.four_bit import FourBit
    from connito.moe.resident import adapted_layers

    total = 0
    for experts, _ in adapted_layers(model).values():
        packed = [part for part in experts.children() if isinstance(part, FourBit)]
        total += sum(buffer.nbytes for part in packed for buffer in part.buffers())
        own = experts.named_buffers(recurse=False)
        spare = len(experts.connito_residents.targets) if experts.connito_residents.residency == "all" else 0
        total += sum(
            2 * (b.numel() - spare * b.shape[1:].numel())
            for name, b in own
            if name.startswith(("helper_", "background_"))
        )
    return total


def moved_slots(full: Any, worker: Any, table: Tokens) -> float:
    """Return the share of the full model's slots, over adapted layers, whose expert the training model does not ask for that
    token.
    """
    import torch
    from connito.moe.resident import adapted_layers

    names = {router: name for name, router in worker.named_modules()}
    routers = [names[router] for _, router in adapted_layers(worker).values()]
    seen: list[list[torch.Tensor]] = []
    for model in (full, worker):
        found: list[torch.Tensor] = []
        handles = [
            model.get_submodule(name).register_forward_hook(lambda _m, _a, out, found=found: found.append(out[2]))
            for name in routers
        ]
        with torch.inference_mode():
            model(input_ids=torch.from_numpy(table[:, :-1].astype("int64")), use_cache=False)
        for handle in handles:
            handle.remove()
        seen.append(found)
    return float(
        np.mean([float((~(a[:, :, None] == b[:, None, :]).any(-1)).float().mean()) for a, b in zip(*seen, strict=True)])
    )


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for row in rows:
        if row["part"] == "formats":
            shown = {key: round(row[key], 3) for key in ("bits", "error", "unpack_ms", "product_ms")}
            figures |= {f"format, {row['format']}": shown}
        elif row["part"] == "traces":
            key = f"traces, {row['task']}, {row['helpers']} helpers"
            figures[key] = {"moved": round(row["moved"], 3), "tokens": round(row["tokens_mostly_moved"], 3)}
            figures[f"traces, {row['task']}, four bits weigh as many helpers"] = round(row["four_bit_experts"], 1)
    base = [row for row in rows if row["part"] == "base"]
    reference = [row["gain"] for row in base if row["arm"] == "all"]
    figures["gain, all"] = spread(reference)
    for arm in ARMS:
        own = [row for row in base if row["arm"] == arm]
        figures[f"base, {arm}"] = {
            "bytes": own[0]["bytes"],
            "strayed": spread([row["strayed"] for row in own]),
            "moved": spread([row["moved"] for row in own]),
            "kept": spread([row["gain"] / best for row, best in zip(own, reference, strict=True)]),
        }
    return figures


def _draw(options: Options, rows: list[dict[str, Any]]) -> None:
    base = [row for row in rows if row["part"] == "base"]

    def values(arm: str, what: str) -> Any:
        return interval([row[what] for row in base if row["arm"] == arm])

    with axes(options.out / "residency.svg", 2) as (first, second):
        first.bars({arm: values(arm, "strayed") for arm in ARMS}, "KL(full || training model), nats per token")
        second.bars({arm: values(arm, "gain") for arm in ARMS}, "gain of the full model, nats per token")


if __name__ == "__main__":
    main("residency", run, doc=__doc__, seeds=5)
