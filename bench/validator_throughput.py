"""Submissions that a validator scores per minute: a copy of the model and a full forward pass each, against rows
swapped in place and the frozen layers below the first adapted one computed once.

Every way reads each submission from its file and gives the same per-sequence losses, which is checked. Building the
cache is charged to the last way; a minute is one of processor time, on one thread. Models: the tiny base's shape, and
30 layers of which the last 6 have experts, like the demo base, at a smaller width; a full run adds the demo base's
own shape. Weights are random: speed does not depend on them.

How early a race ends does depend on what submissions do, so racing is measured apart, on the tiny base with trained
ones (`bench.validator_racing`): six honest miners, one that trained on another domain and one that sent noise. A full run
adds the demo base with one honest miner and one that sent noise.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.harness import Options, Result, interval, main, note
from bench.plots import axes
from bench.random_moe import DEEP, DEMO, Shape, build
from bench.tiny_rig import Tokens
from bench.validator_racing import demo_case, race_round, tiny_case

TINY = Shape(layers=4, dense_layers=2, hidden=64, intermediate=128, experts=8, top_k=2, vocabulary=258)
PER_LAYER, LENGTH, GOAL = 2, 128, 4.0
Losses = npt.NDArray[np.float64]


def run(options: Options) -> Result:
    """Score the same submissions in three ways; repeat `--seeds` times."""
    import torch

    torch.set_num_threads(1)
    shapes = {"tiny": (TINY, 12, 16), "deep": (DEEP, 8, 16)}
    if not options.quick:
        shapes = {"tiny": (TINY, 32, 32), "deep": (DEEP, 16, 32), "demo shape": (DEMO, 6, 8)}
    repeats = min(options.seeds, 2) if options.quick else options.seeds
    rows: list[dict[str, Any]] = []
    for name, (shape, submissions, sequences) in shapes.items():
        note(f"{name}: {submissions} submissions, {sequences} sequences of {LENGTH}")
        for seed in range(repeats if name != "demo shape" else min(2, repeats)):
            rows += [{"model": name, "seed": seed, **row} for row in _round(shape, submissions, sequences, seed)]
    rates = {
        f"{model}: {way}": interval([r["per_minute"] for r in rows if (r["model"], r["way"]) == (model, way)])
        for model in shapes
        for way in WAYS
    }
    with axes(options.out / "validator_throughput.svg", len(shapes)) as panels:
        for axis, model in zip(panels, shapes, strict=True):
            axis.bars({way: rates[f"{model}: {way}"] for way in WAYS}, f"submissions a minute, {model}")
    figures: dict[str, Any] = {key: [round(value, 1) for value in found] for key, found in rates.items()}
    first, *_, last = WAYS
    for model in shapes:
        plain = rates[f"{model}: {first}"][0]
        built = interval([r["per_minute_cache_built"] for r in rows if (r["model"], r["way"]) == (model, last)])[0]
        figures[f"{model}: times faster"] = round(rates[f"{model}: {last}"][0] / plain, 2)
        figures[f"{model}: at most, by arithmetic"] = round(ceiling(shapes[model][0]), 2)
        figures[f"{model}: times faster, cache built"] = round(built / plain, 2)
    cases = {"tiny, trained": [tiny_case(seed, 32 if options.quick else 64) for seed in range(repeats)]}
    if not options.quick:
        cases["demo base, trained"] = [demo_case(32)]
    for name, found in cases.items():
        note(f"{name}: racing")
        raced = [race_round(case) for case in found]
        rows += [{"model": name, "seed": seed, **row} for seed, row in enumerate(raced)]
        for key in (
            "per_minute_whole_copy",
            "per_minute_raced",
            "times_faster",
            "share_of_sequences_read",
            "verdicts_agree",
        ):
            figures[f"{name}, raced: {key}"] = [round(value, 2) for value in interval([row[key] for row in raced])]
    figures["largest_difference_of_losses"] = max(row["difference"] for row in rows if "difference" in row)
    figures["goal_times_faster"] = GOAL
    settings = {
        "experts_selected": f"{PER_LAYER} of 8 in each MoE layer",
        "sequence_length": LENGTH,
        "seeds": repeats,
        "shapes": {name: {**shape.__dict__, "submissions": m, "sequences": n} for name, (shape, m, n) in shapes.items()},
        "torch_threads": 1,
    }  # fmt: skip
    return Result(settings, rows, figures)


def _round(shape: Shape, submissions: int, sequences: int, seed: int) -> list[dict[str, Any]]:
    from connito.moe.layout import require_moe_layers

    model = build(shape, seed)
    rng = np.random.default_rng(seed)
    table = rng.integers(0, shape.vocabulary, (sequences, LENGTH + 1), dtype=np.int32)
    targets = {index: list(range(PER_LAYER)) for index in require_moe_layers(model)}
    with tempfile.TemporaryDirectory() as folder:
        files = _submissions(model, targets, Path(folder), submissions, seed)
        found: dict[str, tuple[float, list[Losses]]] = {}
        for way, score in WAYS.items():
            started = time.process_time()
            losses = score(model, targets, files, table)
            found[way] = time.process_time() - started, losses
        prefix = _building(model, targets, table)
    expected = next(iter(found.values()))[1]
    return [
        {
            "way": way,
            "seconds": seconds,
            "per_minute": 60 * submissions / seconds,
            # What a cycle with very many submissions tends to: the cache is built once.
            "per_minute_cache_built": 60 * submissions / (seconds - (prefix if way == CACHED else 0.0)),
            "difference": max(float(np.abs(a - b).max()) / LENGTH for a, b in zip(losses, expected, strict=True)),
        }
        for way, (seconds, losses) in found.items()
    ]


def _submissions(model: Any, targets: dict[int, list[int]], folder: Path, count: int, seed: int) -> list[Path]:
    """Return files of the base's rows with a little noise."""
    import torch
    from connito.moe.rows import read_rows
    from connito.moe.state import save_state

    generator = torch.Generator().manual_seed(seed)
    rows, paths = read_rows(model, targets), []
    for number in range(count):
        noisy = {name: row + 1e-3 * torch.randn(row.shape, generator=generator) for name, row in rows.items()}
        paths.append(folder / f"{number}.safetensors")
        save_state(noisy, paths[-1])
    return paths


def copy_and_full_forward(model: Any, targets: Any, files: list[Path], table: Tokens) -> list[Losses]:
    """Score with a fresh copy per submission, the model's own forward pass, and the cross entropy of its logits."""
    import torch
    from connito.moe.rows import write_rows
    from connito.moe.state import load_state

    out = []
    for path in files:
        mine = copy.deepcopy(model)
        write_rows(mine, targets, load_state(path))

        def nll(ids: torch.Tensor, wanted: torch.Tensor, mine: Any = mine) -> torch.Tensor:
            logits = mine(input_ids=ids, use_cache=False).logits
            flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            return flat.view(wanted.shape)

        out.append(_sums(nll, table))
    return out


def swap_and_full_forward(model: Any, targets: Any, files: list[Path], table: Tokens) -> list[Losses]:
    """Score with rows written in place and every layer run."""
    from connito.moe.head import Head
    from connito.moe.rows import read_rows, write_rows
    from connito.moe.state import load_state

    before, head, out = read_rows(model, targets), Head(model), []
    for path in files:
        write_rows(model, targets, load_state(path))
        out.append(_sums(head.nll, table))
    write_rows(model, targets, before)
    return out


def swap_and_cached_prefix(model: Any, targets: Any, files: list[Path], table: Tokens) -> list[Losses]:
    """Score as validators do: rows written in place, hidden states below the first adapted layer cached."""
    from connito.moe.evaluate import Evaluator
    from connito.moe.state import load_state

    evaluator = Evaluator(model, targets)
    evaluator.warm(table)
    out = [evaluator.losses(load_state(path), table)[0] for path in files]
    evaluator.restore()
    return out


WAYS: dict[str, Callable[[Any, Any, list[Path], Tokens], list[Losses]]] = {
    "copy and full forward": copy_and_full_forward,
    "swap and full forward": swap_and_full_forward,
    "swap and cached prefix": swap_and_cached_prefix,
}


CACHED = "swap and cached prefix"


def ceiling(shape: Shape) -> float:
    """Return weights a token meets in the whole model over those from the first adapted layer up: what a cache can
    save.

    Attention scores are left out; copying a model comes on top of it.
    """
    attention = shape.hidden**2 * (2 + 2 * shape.kv_heads / shape.heads)
    expert = 3 * shape.hidden * shape.intermediate
    dense = shape.dense_layers * (attention + expert)
    sparse = (shape.layers - shape.dense_layers) * (attention + shape.top_k * expert + shape.hidden * shape.experts)
    above = sparse + shape.hidden * shape.vocabulary
    return (dense + above) / above


def _building(model: Any, targets: Any, table: Tokens) -> float:
    """Return seconds to make an evaluator and fill its cache."""
    from connito.moe.evaluate import Evaluator

    started = time.process_time()
    Evaluator(model, targets).warm(table)
    return time.process_time() - started


def _sums(nll: Callable[..., Any], table: Tokens, batch: int = 16) -> Losses:
    """Sum of negative log-likelihoods per sequence, float64 [n]; 2048 tokens at a time, as the evaluator does."""
    import torch

    sums = []
    with torch.inference_mode():
        for start in range(0, len(table), batch):
            ids = torch.from_numpy(table[start : start + batch].astype(np.int64))
            sums.append(nll(ids[:, :-1], ids[:, 1:]).double().sum(dim=1).numpy())
    return np.concatenate(sums)


if __name__ == "__main__":
    main("validator_throughput", run, doc=__doc__, seeds=5)
