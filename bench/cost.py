"""Costs of expert-only training, full fine-tuning, gradient masking and LoRA for one worker: three separate claims.

Communication: bytes of one upload. Memory: weights, gradients, AdamW moments and activations kept for the backward
pass, summed from the tensors themselves. Compute: multiplications counted by torch, and processor time of a step.
One machine, one run, one torch thread, the same batches; methods take turns step by step, so that whatever else the
machine does hits all of them. Measured on the tiny base and on a wider one with random weights (3 of 16 experts a
layer); computed for three published models from their configurations.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Options, Result, interval, main, note
from bench.plots import axes
from bench.published_models import CONFIGS, Assumed, rows
from bench.tiny_rig import Tokens, everything_else
from bench.training_methods import (
    Job,
    Load,
    Loop,
    Targets,
    expert_only,
    full_fine_tuning,
    gradient_masking,
    lora,
)

BATCH, LENGTH, HELPERS, WARM_UP, RATE = 4, 64, 2, 2, 1e-3
REFERENCE = "full fine-tuning"
# Implementations of a family's experts. torch's counter does not see into the grouped products, so counts use the loop.
COUNTED = "eager"
KERNELS = (COUNTED, "grouped_mm")


def run(options: Options) -> Result:
    """Measure both models, then compute the published ones."""
    import torch

    torch.set_num_threads(1)
    rounds = max(3, options.seeds if not options.quick else 5)
    measured = _tiny(rounds) + _wide(rounds if not options.quick else 4)
    assumed = Assumed()
    computed = [row for name in CONFIGS for row in rows(name, assumed)]
    _plot(measured, options.out / "cost.svg")
    settings = {
        "batch": [BATCH, LENGTH],
        "rounds": rounds,
        "torch_threads": 1,
        "dtype": "float32",
        "experts_implementation": "counts with the family's loop; time with the faster of its loop and grouped products",
        "helpers_per_layer": HELPERS,
        "lora": {"tiny": 4, "wide": 8, "experts": "all", "published": assumed.rank},
        "assumed_for_published": assumed.__dict__,
    }
    return Result(settings, measured + computed, _figures(measured, computed))


def _tiny(rounds: int) -> list[dict[str, Any]]:
    from connito.base.loading import load_full

    from bench.compose_setup import base, text

    with tempfile.TemporaryDirectory() as folder:
        note("tiny base")
        source = base(Path(folder), 0)
        table = text("recipes", BATCH * (rounds + WARM_UP + 1), 1, LENGTH)
        return _measure("tiny", lambda: load_full(source), 2, 4, table, rounds)


def _wide(rounds: int) -> list[dict[str, Any]]:
    from bench.random_moe import WIDE, build, copies

    note("wide model, random weights")
    shape = (BATCH * (rounds + WARM_UP + 1), LENGTH + 1)
    table = np.random.default_rng(0).integers(0, WIDE.vocabulary, shape, dtype=np.int32)
    return _measure("wide", copies(build(WIDE)), 3, 8, table, rounds)


def _measure(model: str, load: Load, per_layer: int, rank: int, table: Tokens, rounds: int) -> list[dict[str, Any]]:
    from connito.moe.budget import Budget
    from connito.moe.selection import select_experts
    from connito.moe.statistics import collect

    statistics = collect(load(), table[: 2 * BATCH, :-1])
    chosen = select_experts(
        statistics, "esft-token", 1.0, budget=Budget(per_layer, scope="layer"), helpers_per_layer=HELPERS
    )
    targets, helpers = chosen.layers, chosen.helpers
    total = chosen.total // len(targets)
    upper = {layer: experts for layer, experts in targets.items() if layer >= sorted(targets)[len(targets) // 2]}
    makers: list[Callable[[], Job]] = [
        lambda: expert_only(load, targets, helpers),
        lambda: expert_only(load, targets, everything_else(targets, total), "expert-only, all helpers"),
        lambda: expert_only(load, upper, helpers_of(upper, helpers), "expert-only, upper layers"),
        lambda: full_fine_tuning(load),
        lambda: gradient_masking(load, targets),
        lambda: lora(load, rank),
    ]
    batches = table.reshape(-1, BATCH, LENGTH + 1)
    loops = [Loop(make(), RATE) for make in makers]
    times = _race(loops, batches[: rounds + WARM_UP])
    return [
        {"model": model, "experts_trained": _share(loop.job.name, targets, upper, total),
         **_row(loop, batches[-1], times[loop.job.name])}
        for loop in loops
    ]  # fmt: skip


Times = dict[str, list[tuple[float, float]]]


def _race(loops: list[Loop], batches: Tokens) -> dict[str, Times]:
    """Return (processor, wall) seconds of each step after the warm-up, by method and experts implementation."""
    times: dict[str, Times] = {loop.job.name: {} for loop in loops}
    for number, batch in enumerate(batches):
        for loop in loops:
            # Expert-only layers bring their own implementation; the others may use the faster of the family's two.
            for implementation in KERNELS[:1] if "expert-only" in loop.job.name else KERNELS:
                loop.job.model.set_experts_implementation(implementation)  # type: ignore[operator]
                wall, busy = time.perf_counter(), time.process_time()
                loop.step(batch)
                if number >= WARM_UP:
                    taken = (time.process_time() - busy, time.perf_counter() - wall)
                    times[loop.job.name].setdefault(implementation, []).append(taken)
    for loop in loops:
        loop.job.model.set_experts_implementation(COUNTED)  # type: ignore[operator]
    return times


def helpers_of(targets: Targets, helpers: dict[int, list[int]]) -> dict[int, list[int]]:
    """Return helpers of the layers that have targets; other layers keep their whole bank."""
    return {layer: helpers[layer] for layer in targets}


def _share(name: str, targets: Targets, upper: Targets, total: int) -> str:
    if name in {REFERENCE, "LoRA"}:
        return f"{total} of {total} in {len(targets)} layers"
    layers = upper if "upper" in name else targets
    return f"{len(next(iter(layers.values())))} of {total} in {len(layers)} layers"


def _row(loop: Loop, batch: Tokens, times: Times) -> dict[str, Any]:
    """Measure one method. Bytes are read right after a backward pass, when they are at their largest."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        loop.forward_backward(batch)
    activations = activation_bytes(loop, batch)
    tensors = [*loop.job.model.parameters(), *loop.job.model.buffers()]
    parts = {
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "gradient_bytes": loop.gradient_bytes(),
        "optimiser_bytes": loop.state_bytes(),
        "activation_bytes": activations,
    }
    faster = min(times, key=lambda name: interval([busy for busy, _ in times[name]])[0])
    busy, wall = (interval(column) for column in zip(*times[faster], strict=True))
    return {
        "method": loop.job.name,
        "trained_parameters": sum(parameter.numel() for parameter in loop.job.parameters),
        "upload_bytes": loop.job.upload(),
        **parts,
        "resident_bytes": sum(parts.values()),
        "flops": counter.get_total_flops(),
        "implementation": faster,
        "step_cpu_ms": [1000 * value for value in busy],
        "step_wall_ms": [1000 * value for value in wall],
    }


def activation_bytes(loop: Loop, batch: Tokens) -> int:
    """Return bytes that autograd keeps between forward and backward pass, parameters not counted, each storage once."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in loop.job.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loop.forward_backward(batch)
    return sum(kept.values())


def _figures(measured: list[dict[str, Any]], computed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return each claim as a share of full fine-tuning, by model and method."""
    figures: dict[str, Any] = {}
    for model in dict.fromkeys(row["model"] for row in (*measured, *computed)):
        group = [row for row in (*measured, *computed) if row["model"] == model]
        whole = next(row for row in group if row["method"] == REFERENCE)
        for row in group:
            if row["method"] == REFERENCE:
                continue
            figures[f"{model}, {row['method']}"] = {
                "upload": round(row["upload_bytes"] / whole["upload_bytes"], 4),
                "memory": round(row["resident_bytes"] / whole["resident_bytes"], 4),
                "optimiser": round(row["optimiser_bytes"] / whole["optimiser_bytes"], 4),
                "flops": round(row["flops"] / whole["flops"], 4),
                **({"step_cpu": round(row["step_cpu_ms"][0] / whole["step_cpu_ms"][0], 4)} if "step_cpu_ms" in row else {}),
            }  # fmt: skip
    return figures


def _plot(measured: list[dict[str, Any]], path: Path) -> None:
    """Plot the three claims on the wide model, as shares of full fine-tuning."""
    group = [row for row in measured if row["model"] == "wide"]
    whole = next(row for row in group if row["method"] == REFERENCE)
    with axes(path, 3) as panels:
        for axis, (key, label) in zip(
            panels,
            (("upload_bytes", "upload"), ("resident_bytes", "memory"), ("step_cpu_ms", "step time")),
            strict=True,
        ):
            base = whole[key][0] if isinstance(whole[key], list) else whole[key]
            axis.bars({row["method"]: _scaled(row[key], base) for row in group}, f"{label} (full = 1)")


def _scaled(value: Any, base: float) -> tuple[float, float, float]:
    mean, low, high = value if isinstance(value, list) else (value, value, value)
    return mean / base, low / base, high / base


if __name__ == "__main__":
    main("cost", run, doc=__doc__, seeds=15)
