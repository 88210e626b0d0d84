"""Parity, memory and speed on a GPU. Each part is a process with its own time; one that fails says why.

parity       logits and gradients of eight families' training models beside transformers' own, in float32
training     peak memory and tokens a second of published shapes with random weights, as `connito miner fits` sets them up
transformers the same steps with transformers alone
scoring      tokens a second of a validator's evaluation and of a selector's routing
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import machine
from bench.memory import SHAPES, Shape, config_of, experts_of
from bench.published_models import CONFIGS

# Seconds of each part. What is trained is a part each, since a process that ran out of memory keeps what it holds.
LOOPS = ("training", "transformers")
PARTS = {"parity": 60, "scoring": 60, **{f"{loop} {model}": 60 for model in CONFIGS for loop in LOOPS}}
FAMILIES = ("olmoe", "qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "glm4_moe", "gpt_oss")
NEEDED = ("torch", "transformers", "numpy", "safetensors", "bitsandbytes")


def missing() -> list[str]:
    """Return the packages that this machine lacks for the check."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


Rows = Iterator[dict[str, Any]]


def parity(device: str) -> Rows:
    """Yield the largest difference of logits and of the targets' gradients, relative to the largest value, by family."""
    import copy

    import torch
    from connito.moe.layout import require_moe_layers
    from connito.moe.resident import compress, target_parameters
    from transformers import AutoModelForCausalLM

    for shape in (next(s for s in SHAPES if s.family == family) for family in FAMILIES):
        config = config_of(Shape(shape.name, shape.family, shape.config))
        torch.manual_seed(0)
        full = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(device)
        targets, _ = experts_of(Shape("", shape.family, shape.config, targets=2, helpers=0), config)
        mine = compress(copy.deepcopy(full), targets, residency="all").to(device)
        ids = torch.randint(3, 4000, (2, 32), generator=torch.Generator().manual_seed(1)).to(device)
        said = [model(input_ids=ids, use_cache=False).logits for model in (full, mine)]
        for logits in said:
            logits.square().mean().backward()
        layers, gradients = require_moe_layers(full), []
        for name, parameter in target_parameters(mine).items():
            _, index, part = name.split(".")
            whole = getattr(layers[int(index)].experts, part).grad[targets[int(index)]]
            # Rows that no token came to have no gradient where a whole bank has zeros.
            gradients.append(_apart(torch.zeros_like(whole) if parameter.grad is None else parameter.grad, whole))
        yield {"family": shape.family, "logits": _apart(*said), "gradients": max(gradients)}


def _apart(one: Any, other: Any) -> float:
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def training(part: str, device: str) -> Rows:
    """Yield measured beside predicted peak, and speed, of a published shape; on the CPU of a small one of that family."""
    loop, _, name = part.partition(" ")
    yield (_trained if loop == LOOPS[0] else _plain)(*_job(name, device), device)


def _job(name: str, device: str) -> tuple[str, Any, dict[int, list[int]], Any]:
    from connito.moe.engine import Engine
    from connito.moe.footprint import Workload
    from connito.workloads.rehearsal import same_everywhere

    family, values = CONFIGS[name]
    if device == "cpu":
        small = config_of(next(shape for shape in SHAPES if shape.family == family))
        return name, small, same_everywhere(small, 2), Workload(1, 64, residency="four-bit")
    import torch
    from transformers import AutoConfig

    config = AutoConfig.for_model(family, **values)
    config.dtype = torch.bfloat16
    work = Workload(1, 2048, residency="four-bit", cuda=True, engine=Engine(checkpointing=True))
    return name, config, same_everywhere(config, 10 if "Qwen3" in name else 5), work


def _trained(name: str, config: Any, targets: dict[int, list[int]], work: Any, device: str) -> dict[str, Any]:
    import torch
    from connito.moe.training import train_local
    from connito.workloads.rehearsal import rehearse, with_random_weights

    row: dict[str, Any] = {"model": name, "predicted_bytes": rehearse(config, targets, {}, work).total}
    try:
        model = with_random_weights(config, targets, {}, work, torch.device(device))
        shape = (2, work.sequences, work.length + 1)
        batches = np.random.default_rng(0).integers(3, config.vocab_size, shape, dtype=np.int32)
        seconds: list[float] = []
        train_local(
            model,
            batches,
            learning_rate=1e-5,
            optimizer=work.engine.optimizer,
            on_step=lambda s: seconds.append(s.seconds),
        )
        row |= {"tokens_per_second": work.sequences * work.length / seconds[-1]}
        if device != "cpu":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
    except RuntimeError as error:
        row["failed"] = str(error).splitlines()[0]
    return row


def _plain(name: str, config: Any, targets: dict[int, list[int]], work: Any, device: str) -> dict[str, Any]:
    """Measure the same steps with transformers alone: whole banks get gradients and torch's AdamW, as fused experts need it."""
    import torch
    from connito.moe.layout import require_moe_layers
    from connito.workloads.rehearsal import with_random_weights

    row: dict[str, Any] = {"model": name, "loop": "transformers"}
    try:
        model: Any = with_random_weights(config, {}, {}, work, torch.device(device))
        model.activation_checkpointing_enable()
        model.train()
        layers = require_moe_layers(model)
        rows = [getattr(layers[index].experts, part) for index in targets for part in layers[index].parameters]
        for bank in rows:
            bank.requires_grad_(True)
        optimiser = torch.optim.AdamW(rows, lr=1e-5)
        ids = torch.randint(3, config.vocab_size, (work.sequences, work.length)).to(device)
        for _ in range(2):
            begun = time.perf_counter()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            if device != "cpu":
                torch.cuda.synchronize()
        row["tokens_per_second"] = ids.numel() / (time.perf_counter() - begun)
        if device != "cpu":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
    except RuntimeError as error:
        row["failed"] = str(error).splitlines()[0]
    return row


def scoring(device: str) -> Rows:
    """Yield tokens a second of evaluation and of routing, on a mixture of random weights."""
    import torch
    from connito.moe.evaluate import Evaluator
    from connito.moe.statistics import collect

    from bench.random_moe import DEEP, WIDE, build

    shape = WIDE if device == "cpu" else DEEP
    model = build(shape).to(torch.device(device))
    rows = np.random.default_rng(0).integers(0, shape.vocabulary, (8, 129), dtype=np.int32)
    selection = {layer: [0, 1, 2] for layer in range(shape.layers // 2, shape.layers) if layer >= shape.dense_layers}
    judge = Evaluator(model, selection)
    uses: dict[str, Callable[[], object]] = {
        "validator": lambda: judge.losses(None, rows),
        "selector": lambda: collect(model, rows[:, :-1]),
    }
    for name, use in uses.items():
        use()
        begun = time.perf_counter()
        use()
        yield {"service": name, "tokens_per_second": rows[:, 1:].size / (time.perf_counter() - begun)}


def run_part(part: str, device: str, seconds: int) -> dict[str, Any]:
    """Run a part in a process of its own; return its rows, and why there are no more of them."""
    return gathered([sys.executable, "-m", "bench.gpu_check", "--part", part, "--device", device], seconds)


def gathered(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run a command that prints a row a line; return those, and why there are no more of them."""
    begun, found = time.monotonic(), dict[str, Any]()
    with tempfile.TemporaryFile("w+") as rows, tempfile.TemporaryFile("w+") as said:
        try:
            code = subprocess.run(command, stdout=rows, stderr=said, timeout=seconds, check=False).returncode
            if code:
                said.seek(0)
                found["failed"] = (said.read().strip().splitlines() or ["no reason given"])[-1]
        except subprocess.TimeoutExpired:
            found["failed"] = f"took more than {seconds} s"
        rows.seek(0)
        found["rows"] = [json.loads(line) for line in rows if line.endswith("\n")]
    return {"seconds": round(time.monotonic() - begun, 1), **found}


def main() -> int:
    """Run every part, or one, and write what was found."""
    parser = argparse.ArgumentParser(prog="scripts/gpu-check", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--part", choices=sorted(PARTS))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    arguments = parser.parse_args()
    if lacking := missing():
        print(
            f"this machine lacks {', '.join(lacking)}: run `make setup`, or install them where there is no network",
            file=sys.stderr,
        )
        return 5
    import torch

    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            "torch finds no GPU here: use a build of torch for CUDA on a machine with one, or --device cpu",
            file=sys.stderr,
        )
        return 5
    if arguments.part:
        parts: dict[str, Callable[[str], Rows]] = {"parity": parity, "scoring": scoring}
        for row in parts.get(arguments.part, partial(training, arguments.part))(arguments.device):
            print(json.dumps(row), flush=True)
        return 0
    found = {part: run_part(part, arguments.device, seconds) for part, seconds in PARTS.items()}
    gpu = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "none"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gpu_check.json"
    path.write_text(json.dumps({**machine(), "gpu": gpu, "torch": torch.__version__, **found}, indent=1) + "\n")
    print(f"written to {path}")
    failed = {part: row["failed"] for part, rows in found.items() for row in (rows, *rows["rows"]) if "failed" in row}
    for part, reason in failed.items():
        print(f"{part} failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
