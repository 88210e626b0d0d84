"""Twenty experts of one base served at once, against the base alone and against twenty merged models swapped in turn.

Random weights of the shapes in `bench.random_moe`; every expert replaces 7.5 % of the routed experts, at least one a layer,
drawn by its seed: the share that ESFT selects of DeepSeek-V2-Lite, though there they take more of the tokens than here. One
request a model, greedy. `base alone`: as many requests, all for the base. `mixed`: one for each expert, in one batch.
`swapped`: the same requests, one model after the other, rows written into the base and taken out again, which is kinder than
loading each model. `reloaded`: each merged model read from disk too. Batches, sampling and cache are the server's in all
arms. Times are processor time of the process, in one thread: the best of several rounds, arms in turn.
"""

from __future__ import annotations

import asyncio
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from connito.base.checkpoint import save_checkpoint
from connito.base.loading import load_full
from connito.base.tiny import tokenizer
from connito.curation.serving.generation import Generator
from connito.curation.serving.requests import Sampling
from connito.experts.compose import Rows, layers_of, state_of
from connito.experts.table import BASE, ExpertTable
from connito.moe.layout import require_moe_layers
from connito.moe.rows import read_rows, write_rows

from bench.harness import Options, Result, main, note
from bench.random_moe import DEEP, DEMO, WIDE, Shape, build

EXPERTS, PROMPT, SHARE = 20, 16, 0.075
# Many small experts, as DeepSeek-V2-Lite has them.
FINE = Shape(layers=6, dense_layers=0, hidden=256, intermediate=96, experts=64, top_k=6, vocabulary=2048)
SHAPES = {"FINE": FINE, "WIDE": WIDE, "DEEP": DEEP, "DEMO": DEMO}
FIGURES = (
    "memory_over_rows",
    "mixed_of_base_alone",
    "mixed_times_swapped",
    "base_alone_times_swapped",
    "mixed_times_reloaded",
    "same_answers",
)
Requests = Sequence[tuple[list[int], int]]


def run(options: Options) -> Result:
    """Time the arms on three shapes, four without --quick; check that their answers are the same.

    Each shape's row of a full run is kept in a file: a run goes on where it was stopped.
    """
    answer, rounds = (16, 2) if options.quick else (48, 3)
    names = [name for name in SHAPES if name in options.only.split(",")] or [*SHAPES][: 3 if options.quick else 4]
    result = Result({"experts": EXPERTS, "prompt": PROMPT, "answer": answer, "rounds": rounds, "in_parts": True})
    for name in names:
        kept = options.out / f"serving-{'quick' if options.quick else 'shapes'}" / f"{name}.json"
        if not kept.exists():
            # A process for each: memory that another shape had freed would hide what the rows take.
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
                row = {"shape": name, **own.submit(_measure, SHAPES[name], answer, rounds).result()}
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(row))
            note(f"{name}: {row}")
        row = json.loads(kept.read_text())
        result.rows.append(row)
        for key in FIGURES:
            result.figures[f"{name} {key}"] = row[key]
    return result


def _measure(shape: Shape, answer: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = save_checkpoint(build(shape), Path(folder) / "base", tokenizer())
        model = load_full(base)
        # Touched once: pages that are mapped count from then on.
        with torch.inference_mode():
            model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        rows = [_expert(model, seed) for seed in range(EXPERTS)]
        table = ExpertTable(model)
        gc.collect()
        before = _resident()
        slots = [table.add(str(number), own) for number, own in enumerate(rows)]
        grown = _resident() - before
        generator = Generator(table, ends=set(), cache_tokens=8192, batch_tokens=512, requests=EXPERTS)
        generator.start()
        try:
            return _arms(generator, table, rows, slots, base, answer, rounds) | {
                "base_bytes": sum(p.nbytes for p in model.parameters()),
                "row_bytes": table.row_bytes(),
                "memory_over_rows": round(grown / table.row_bytes(), 3),
            }
        finally:
            generator.stop()


def _arms(
    generator: Generator, table: ExpertTable, rows: Sequence[Rows], slots: Sequence[int], base: Path, answer: int, rounds: int
) -> dict[str, Any]:  # fmt: skip
    draw = torch.Generator().manual_seed(7)
    prompts = [torch.randint(2, 250, (PROMPT,), generator=draw).tolist() for _ in rows]
    how = Sampling(answer, temperature=0.0)

    def batch(requests: Requests) -> list[list[int]]:
        async def one(ids: list[int], slot: int) -> list[int]:
            return [token async for new in generator.answer(ids, slot, how) for token in new]

        async def every() -> list[list[int]]:
            return await asyncio.gather(*(one(ids, slot) for ids, slot in requests))

        return asyncio.run(every())

    def swapped() -> list[list[int]]:
        found = []
        for ids, own in zip(prompts, rows, strict=True):
            layers = layers_of(own)
            with generator.paused():
                kept = read_rows(table.model, layers)
                write_rows(table.model, layers, state_of(own))
            found += batch([(ids, BASE)])
            with generator.paused():
                write_rows(table.model, layers, kept)
        return found

    def reloaded() -> list[list[int]]:
        # Reading alone, of copies that lie on disk; the answers are those of `swapped`.
        for _ in rows:
            for tensor in load_full(base).state_dict().values():
                tensor.clone()
        return []

    mixed = [(ids, slot) for ids, slot in zip(prompts, slots, strict=True)]
    arms: dict[str, Callable[[], list[list[int]]]] = {
        "base alone": lambda: batch([(ids, BASE) for ids in prompts]), "mixed": lambda: batch(mixed),
        "swapped": swapped, "reloaded": reloaded,
    }  # fmt: skip
    best, said = dict.fromkeys(arms, float("inf")), {}
    for _ in range(rounds):
        for name, arm in arms.items():
            started = time.process_time()
            said[name] = arm()
            best[name] = min(best[name], time.process_time() - started)
    tokens = EXPERTS * answer
    return {
        "tokens_per_second": {name: round(tokens / best[name], 1) for name in ("base alone", "mixed", "swapped")},
        "mixed_of_base_alone": round(best["base alone"] / best["mixed"], 3),
        "mixed_times_swapped": round(best["swapped"] / best["mixed"], 2),
        # What batching alone gains: more than that no mixed batch can.
        "base_alone_times_swapped": round(best["swapped"] / best["base alone"], 2),
        "mixed_times_reloaded": round((best["swapped"] + best["reloaded"]) / best["mixed"], 2),
        "same_answers": sum(a == b for a, b in zip(said["mixed"], said["swapped"], strict=True)) / EXPERTS,
    }


def _expert(model: Any, seed: int) -> Rows:
    draw, rows = torch.Generator().manual_seed(seed), {}
    for index, layer in require_moe_layers(model).items():
        count = max(1, round(layer.num_experts * SHARE))
        for expert in torch.randperm(layer.num_experts, generator=draw)[:count].tolist():
            for name in layer.parameters:
                origin = getattr(layer.experts, name)[expert].detach()
                rows[index, expert, name] = origin + torch.randn(origin.shape, generator=draw) * origin.std() * 0.5
    return rows


def _resident() -> int:
    with Path("/proc/self/statm").open() as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    main("serving", run, doc=__doc__ or "")
