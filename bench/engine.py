"""Costs of a miner's engine, and what it learns: beside a plain transformers loop, and moments of one byte beside four.

Speed and memory: the same selection of a random bfloat16 model, the same batches, one process and one torch thread, ways
taking turns of a few steps. Memory is the model's tensors and the most that torch's allocator gave out beyond them during
two steps. Learning: the tiny base, three cycles that keep AdamW's second moment in a file as a miner does.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import optimizers
from bench.harness import Options, Result, main, note
from bench.memory import allocated_peak, held_bytes
from bench.plots import axes
from bench.random_moe import Shape, build, copies
from bench.tiny_rig import Rig, batched, mean_loss, rig_settings, rigs, spread

SHAPE = Shape(layers=6, dense_layers=1, hidden=256, intermediate=176, experts=32, top_k=4, vocabulary=16384)
TARGETS = {layer: [1, 9, 17] for layer in range(1, SHAPE.layers)}
BATCH, LENGTH, RATE = 2, 256, 1e-4
# Steps of a turn.
TURN = 4
CYCLES, STEPS, SIZE, LEARNING_RATE = 3, 40, 4, 1e-3
PLAIN, OURS = "plain loop, trained experts in float32", "connito"
QUICK_SEEDS = 3


def run(options: Options) -> Result:
    """Measure what learning keeps, then speed and memory."""
    learned = _learned(options)
    timed = _timed(1 if options.quick else 5)
    libraries = [] if options.quick else optimizers.compare()
    _plot(timed, options.out / "engine.svg")
    settings = {
        **rig_settings(options, QUICK_SEEDS),
        "learning": {
            "cycles": CYCLES,
            "steps": STEPS // (4 if options.quick else 1),
            "batch": SIZE,
            "rate": LEARNING_RATE,
        },
        "shape": SHAPE.__dict__,
        "batch": [BATCH, LENGTH],
        "trained": f"{len(TARGETS[1])} of {SHAPE.experts} experts in {len(TARGETS)} layers",
        "dtype": "bfloat16",
    }
    figures = {**_learning_figures(learned), **_speed_figures(timed)}
    figures |= {f"optimiser, {row['implementation']}": row for row in libraries}
    return Result(settings, learned + timed + libraries, figures)


# --- what is learned


def _learned(options: Options) -> list[dict[str, Any]]:
    rows = []
    with rigs(options, quick_seeds=QUICK_SEEDS) as each:
        for rig in each:
            for stored in ("float32", "bfloat16"):
                rows += [
                    {
                        "seed": rig.seed,
                        "stored": stored,
                        "optimizer": optimizer,
                        **_cycles(rig, stored, optimizer, options),
                    }
                    for optimizer in ("adamw", "adamw-8bit")
                ]
    return rows


def _cycles(rig: Rig, stored: str, optimizer: str, options: Options) -> dict[str, Any]:
    """Return the fall of the held-out loss of the full model, and bytes kept for a trained value while training and on disk."""
    import torch
    from connito.moe.moments import Moments
    from connito.moe.resident import compress, target_parameters
    from connito.moe.rows import write_rows
    from connito.moe.training import train_local

    dtype = getattr(torch, stored)
    selection = rig.select(["recipes"], 3)
    model = compress(rig.model().to(dtype), selection.layers, selection.helpers)
    steps = STEPS // (4 if options.quick else 1)
    table = batched(rig.train("recipes", CYCLES * steps * SIZE), SIZE).reshape(CYCLES, steps, SIZE, -1)
    held, full = rig.held("recipes", 32), rig.model().to(dtype)
    before, count = mean_loss(full, held), sum(p.numel() for p in target_parameters(model).values())
    with tempfile.TemporaryDirectory() as name:
        path, moments = Path(name) / "moments", Moments(second_only=True)
        for cycle in table:
            state, _ = train_local(
                model, cycle, learning_rate=LEARNING_RATE, betas=(0.5, 0.95), optimizer=optimizer, moments=moments
            )
            moments.save(path)
            moments = Moments.load(path, second_only=True)
        disk = path.stat().st_size
    write_rows(full, selection.layers, state)
    kept = _state_bytes(dtype, optimizer)
    return {"gain": before - mean_loss(full, held), "state_bytes": kept, "disk_bytes": round(disk / count, 2)}


def _state_bytes(dtype: Any, optimizer: str) -> float:
    """Return bytes of gradient, moments and what completes a value to float32, counted on the tensors of one step."""
    import torch
    from connito.moe.adamw import AdamW
    from connito.moe.engine import is_compact

    row = torch.nn.Parameter(torch.zeros(1 << 16, dtype=dtype))
    own = AdamW({"row": row}, betas=(0.9, 0.95), compact=is_compact(optimizer))
    row.grad = torch.ones_like(row)
    gradient = row.grad.numel() * row.grad.element_size()
    own.step(0.0)
    return (gradient + own.bytes()) / row.numel()


def _learning_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for stored in ("float32", "bfloat16"):
        gains = {
            optimizer: [row["gain"] for row in rows if (row["stored"], row["optimizer"]) == (stored, optimizer)]
            for optimizer in ("adamw", "adamw-8bit")
        }
        kept = [one / four for one, four in zip(gains["adamw-8bit"], gains["adamw"], strict=True)]
        for optimizer, gain in gains.items():
            row = next(row for row in rows if (row["stored"], row["optimizer"]) == (stored, optimizer))
            figures[f"learned, {stored}, {optimizer}"] = {
                "gain": spread(gain),
                "state_bytes": round(row["state_bytes"], 2),
                "disk_bytes": row["disk_bytes"],
                "kept": spread(kept) if optimizer == "adamw-8bit" else [1.0, 1.0, 1.0],
            }
    return figures


# --- speed and memory


@dataclass
class Way:
    """A way of training: its model, and steps on batches [n, B, L + 1], which return the processor seconds of all but the
    first, where a way sets itself up."""

    name: str
    model: Any
    steps: Callable[[Any], list[float]]


def _ways() -> list[Callable[[], Way]]:
    import torch

    load = copies(build(SHAPE).to(torch.bfloat16))
    others = {layer: [e for e in range(SHAPE.experts) if e not in chosen] for layer, chosen in TARGETS.items()}
    few = {layer: experts[:2] for layer, experts in others.items()}
    return [
        lambda: _plain("plain loop, all in bfloat16", load, torch.bfloat16),
        lambda: _plain(PLAIN, load, torch.float32),
        lambda: _own(OURS, load, others, {}),
        lambda: _own("connito, moments of four bytes", load, others, {"optimizer": "adamw"}),
        lambda: _own("connito, checkpointing", load, others, {"checkpointing": True}),
        lambda: _own("connito, grouped experts", load, others, {"experts": "grouped"}),
        lambda: _own("connito, 2 helpers", load, few, {}),
        lambda: _own("connito, 2 helpers, checkpointing", load, few, {"checkpointing": True}),
    ]


def _plain(name: str, load: Callable[[], Any], trained: Any) -> Way:
    import torch

    from bench.plain_loop import PlainLoop, singled

    loop = PlainLoop(singled(load(), TARGETS, trained), RATE, autocast=trained == torch.float32)

    def steps(batches: Any) -> list[float]:
        ends = []
        for ids in batches:
            loop.step(torch.from_numpy(ids.astype("int64")))
            ends.append(time.process_time())
        return np.diff(ends).tolist()

    return Way(name, loop.model, steps)


def _own(name: str, load: Callable[[], Any], helpers: Mapping[int, list[int]], choices: Mapping[str, Any]) -> Way:
    import torch
    from connito.moe.engine import Engine
    from connito.moe.prepare import prepare
    from connito.moe.resident import compress
    from connito.moe.training import train_local

    engine = Engine(**choices)
    model = prepare(compress(load(), TARGETS, helpers), engine, torch.device("cpu"))

    def steps(batches: Any) -> list[float]:
        ends: list[float] = []
        train_local(
            model,
            batches,
            learning_rate=RATE,
            optimizer=engine.optimizer,
            on_step=lambda _: ends.append(time.process_time()),
        )
        return np.diff(ends).tolist()

    return Way(name, model, steps)


def _timed(rounds: int) -> list[dict[str, Any]]:
    shape = (rounds, TURN, BATCH, LENGTH + 1)
    table = np.random.default_rng(0).integers(3, SHAPE.vocabulary, shape, dtype=np.int32)
    rows: list[dict[str, Any]] = []
    ways = []
    for make in _ways():
        way = make()
        note(way.name)
        model = held_bytes(way.model)
        peak = allocated_peak(lambda way=way: way.steps(table[0, :2]))  # type: ignore[misc]
        rows.append({"way": way.name, "model_bytes": model, "step_bytes": peak, "peak_bytes": model + peak})
        ways.append(way)
    taken: dict[str, list[float]] = {way.name: [] for way in ways}
    for batches in table:
        for way in ways:
            taken[way.name] += way.steps(batches)
    for row in rows:
        row["tokens_per_second"] = round(BATCH * LENGTH / statistics.median(taken[row["way"]]), 1)
    return rows


def _speed_figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    plain = next(row for row in rows if row["way"] == PLAIN)
    return {
        f"speed, {row['way']}": {
            "tokens_per_second": row["tokens_per_second"],
            "peak_bytes": row["peak_bytes"],
            "speed": round(row["tokens_per_second"] / plain["tokens_per_second"], 2),
            "memory": round(row["peak_bytes"] / plain["peak_bytes"], 2),
        }
        for row in rows
    }


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    with axes(path, 2) as (speed, memory):
        speed.bars({row["way"]: (row["tokens_per_second"],) * 3 for row in rows}, "tokens per second")
        memory.bars({row["way"]: (row["peak_bytes"] / 2**20,) * 3 for row in rows}, "peak MiB")


if __name__ == "__main__":
    main("engine", run, doc=__doc__, seeds=5)
