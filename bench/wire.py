"""Bytes against gain: what a miner uploads under each codec, what it downloads, and how much of the gain of rows it keeps.

A cell is one codec, one number H of local steps, IID or not, one seed: cycles of four miners in a closed loop on the tiny base,
with the project's own encoder, files, error feedback, decoder and the default policy's merge; no gate. `kept` is the fall of the
held-out loss over that of the same cell with rows. Bytes are those of the files. A cell that has been computed is a JSON in
`<out>/wire/` and is not computed again; processes side by side share the cells. Tiny matrices hide what low rank saves, so the
bytes of one upload are also those of noise in the shapes of the demo's selection, of one layer times six.

Styles of others are their form and their feedback, on the same rig: DeMo's DCT of 64 by 64 and momentum (Peng et al., 2024),
SparseLoCo's top-k of 4,096 with two bits (Sarfi et al., 2025), eight bits in blocks. No code of theirs runs here.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from connito.data.codecs.file import codec, read_coded, write_coded
from connito.protocol.claims import claimed_rows
from connito.protocol.coding import codec_of, decoded, encode
from connito.v1.run_pb2 import TrainPolicy

from bench.compose_setup import base
from bench.decentralised import Bench, loss_of, shards_of, tensors
from bench.decentralised_cells import RATES
from bench.harness import Options, Result, interval, main, note
from bench.local_work import Miner
from bench.merging import BETA1, MOMENTS, WHOLE, Merge, merged
from bench.tiny_rig import Rig, Tokens
from tests.support.steps import write_coded_step

MINERS, BATCH = 4, 4
# H -> cycles. A cell has to end within twenty seconds.
CYCLES = {5: 20, 20: 8, 50: 4}
DATA = ("IID", "non-IID")
# Of the demo's selection one layer: 2 experts of 576 by 1536 in three matrices; there are six. Its base in float16.
LAYERS = 6
DEMO_SHAPES = {"layers.0.down_proj": ("F32", (2, 576, 1536)), "layers.0.gate_up_proj": ("F32", (2, 3072, 576))}
DEMO_DENSE = 2 * 246_000_000
DCT, DECAY = 64, 0.95


@dataclass(frozen=True)
class Arm:
    """A codec, whether what it leaves out is kept, whether it works on a DCT of blocks, and the codec of outer steps."""

    policy: TrainPolicy
    feedback: bool = True
    transformed: bool = False
    step: str = "rows"


def _arm(name: str, feedback: bool = True, rank: int = 16, share: float = 0.01, transformed: bool = False) -> Arm:
    return Arm(TrainPolicy(codec=name, codec_rank=rank, codec_share=share), feedback, transformed)


def _down(step: str) -> Arm:
    """Return the arm of uploads as by default whose outer steps are coded."""
    return replace(_arm("ternary", feedback=False), step=step)


# In the order in which cells are computed: what matters most comes first.
ARMS = {
    "rows": _arm("rows"),
    "ternary": _arm("ternary"),
    "low-rank 4": _arm("low-rank", rank=4),
    "SparseLoCo style, 1 %": _arm("top-k"),
    "DeMo style, 1 %": _arm("top-k", transformed=True),
    "eight bits, no feedback": _arm("int8", feedback=False),
    "low-rank 16": _arm("low-rank"),
    "low-rank 1": _arm("low-rank", rank=1),
    "ternary, no feedback": _arm("ternary", feedback=False),
    "int4": _arm("int4"),
    "top-k 5 %": _arm("top-k", share=0.05),
    "low-rank 4, no feedback": _arm("low-rank", feedback=False, rank=4),
    "top-k 1 %, no feedback": _arm("top-k", feedback=False),
    "steps in int8": _down("int8"),
    "steps in int4": _down("int4"),
    "steps in ternary": _down("ternary"),
}
FIRST = 6
QUICK = ("rows", "ternary", "low-rank 4")


def run(options: Options) -> Result:
    """Compute the cells that are missing: a seed at a time, of the first arms before the others."""
    import torch

    torch.set_num_threads(1)
    folder = options.out / "wire"
    folder.mkdir(exist_ok=True)
    arms = QUICK if options.quick else tuple(ARMS)
    steps, data = ((5,), ("IID",)) if options.quick else (tuple(CYCLES), DATA)
    tiers = (arms[:FIRST], arms[FIRST:])
    cells = [
        (arm, h, kind, seed)
        for tier in tiers
        for kind in data
        for seed in range(options.seeds)
        for arm in tier
        for h in steps
    ]
    uploads = {arm: _upload(folder, arm) for arm in arms if not ARMS[arm].transformed and ARMS[arm].step == "rows"}
    for number, (arm, h, kind, seed) in enumerate(cells):
        path = folder / f"{arm.replace(' ', '-').replace('%', 'percent')}-{h}-{kind}-{seed}.json"
        if all(part in path.name for part in options.only.split()) and claim(path):
            note(f"cell {number + 1} of {len(cells)}: {arm}, H = {h}, {kind}, seed {seed}")
            _write(path, _cell(folder, arm, h, kind, seed))
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*-IID-*.json"))]
    wanted = {(arm, h, kind) for arm, h, kind, _ in cells}
    rows = [row for row in rows if (row["arm"], row["steps"], row["data"]) in wanted]
    settings = {
        "miners": MINERS,
        "batch_sequences": BATCH,
        "cycles": {str(h): CYCLES[h] for h in steps},
        "base": "tiny",
        "cells": len(cells),
        "computed": len(rows),
    }
    return Result(settings, rows, {**_kept(rows), **{f"upload {arm}": found for arm, found in uploads.items()}})


def claim(path: Path) -> bool:
    """Return whether a cell is this process's to compute: nobody has it, or who had it is gone."""
    mine = path.with_suffix(".claim")
    if path.exists():
        return False
    try:
        with mine.open("x") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        owner = mine.read_text()
        if owner and Path(f"/proc/{owner}").exists():
            return False
        mine.write_text(str(os.getpid()))
    return True


def _write(path: Path, cell: dict[str, Any]) -> None:
    path.write_text(json.dumps(cell) + "\n")
    path.with_suffix(".claim").unlink(missing_ok=True)


def _rig(folder: Path, seed: int) -> Rig:
    place = folder / f"base-{seed}"
    if not (place / "done").exists():
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            built = base(Path(draft), seed)
            (built / "done").touch()
            if not place.exists():
                built.rename(place)
    return Rig(seed, place)


def _cell(folder: Path, name: str, h: int, kind: str, seed: int) -> dict[str, Any]:
    begun = time.process_time()
    bench = Bench(_rig(folder, seed))
    shards = shards_of(bench.rig, MINERS, h, iid=kind == "IID", total=CYCLES[h] * h, batch=BATCH)
    with tempfile.TemporaryDirectory() as work:
        losses, sizes, down = _loop(bench, shards, RATES[h], ARMS[name], Path(work))
    return {
        "arm": name,
        "steps": h,
        "data": kind,
        "seed": seed,
        "start": bench.start,
        "end": losses[-1],
        "curve": losses,
        "bytes": sum(sizes) / len(sizes),
        "down_bytes": sum(down) / len(down),
        "cpu_seconds": round(time.process_time() - begun, 1),
    }


def _loop(bench: Bench, shards: Tokens, rate: float, arm: Arm, work: Path) -> tuple[list[float], list[int], list[int]]:
    """Return the loss after each cycle, the sizes of all uploads, and of what a miner fetches of each version. Merged as a run's
    policy says that says nothing."""
    from connito.moe.moments import Moments
    from connito.moe.resident import write_targets
    from connito.moe.routed import routed_tokens
    from connito.moe.state import load_state, save_state
    from connito.moe.training import BETAS

    theta, outer, how = {name: rows.numpy() for name, rows in bench.evaluator.base.items()}, None, Merge.default()
    kept = [Moments(second_only=MOMENTS == "second") for _ in range(MINERS)]
    miners = [Miner("adamw", moments, (BETA1, BETAS[1])) for moments in kept]
    wires = [_Wire(arm, work / str(number)) for number in range(MINERS)]
    losses, sizes, down = [], [], []
    for cycle in shards:
        start, states, routed = tensors(theta), [], []
        save_state(start, work / "theta")
        for miner, wire, batches in zip(miners, wires, cycle, strict=True):
            if how.weighting != WHOLE:
                write_targets(bench.model, start)
                routed.append(routed_tokens(bench.model, bench.selection, claimed_rows(batches)))
            save_state(miner.work(bench.model, start, batches, rate), work / "rows")
            sent, there = wire.send(work / "rows", work / "theta")
            sizes.append(sent)
            states.append(load_state(there))
        utilities = [1.0] * len(states)
        if how.counts_utilities:
            before = loss_of(bench.evaluator, start, bench.score)
            utilities = [max(1e-9, before - loss_of(bench.evaluator, state, bench.score)) for state in states]
        theta, outer = merged(how, theta, outer, states, utilities, routed, kept)
        theta, fetched = _version(theta, arm.step, work)
        down.append(fetched)
        losses.append(loss_of(bench.evaluator, tensors(theta), bench.report))
    return losses, sizes, down


def _version(theta: Any, step: str, work: Path) -> tuple[Any, int]:
    """Return the version that a merge leads to, and the bytes that whoever has the one before fetches of it."""
    from connito.moe.state import load_state, save_state

    save_state(tensors(theta), work / "exact")
    if step == "rows":
        return theta, (work / "exact").stat().st_size
    write_coded_step(codec(step), work / "theta", work / "exact", work / "next", work / "step")
    return {name: rows.numpy() for name, rows in load_state(work / "next").items()}, (work / "step").stat().st_size


class _Wire:
    """One miner's way to the others, with what it keeps on its disk."""

    def __init__(self, arm: Arm, folder: Path) -> None:
        self._arm, self._folder, self._cycle = arm, folder, 0
        self._momentum: dict[str, Any] = {}
        folder.mkdir()

    def send(self, rows: Path, theta: Path) -> tuple[int, Path]:
        """Return the bytes of the upload, and the state that it stands for."""
        if self._arm.policy.codec == "rows":
            return rows.stat().st_size, rows
        if self._arm.transformed:
            return self._transformed(rows, theta)
        coded, left = self._folder / "coded", self._folder / f"left-{self._cycle}"
        self._cycle += 1
        leaves = self._folder / f"left-{self._cycle}"
        kept = left if self._arm.feedback and left.exists() else None
        encode(rows, theta, self._arm.policy, kept, coded, leaves)
        return coded.stat().st_size, decoded(coded, theta, self._arm.policy, self._folder)

    def _transformed(self, rows: Path, theta: Path) -> tuple[int, Path]:
        """Send the largest coefficients of the momentum and take them out of it."""
        from connito.data.pseudo_gradients import load_float32
        from connito.data.tensors import read_header, tensor_bytes

        layout = {name: (entry.dtype, entry.shape) for name, entry in read_header(theta).entries.items()}
        for name in layout:
            delta = load_float32(theta, name) - load_float32(rows, name)
            self._momentum[name] = DECAY * self._momentum.get(name, 0.0) + delta
        how, coded = codec_of(self._arm.policy), self._folder / "coded"
        write_coded(how, layout, lambda name: _dct(self._momentum[name], inverse=False), coded)
        moved = {}
        for name, coefficients in read_coded(how, layout, coded):
            sent = _dct(coefficients, inverse=True)
            self._momentum[name] = self._momentum[name] - sent
            moved[name] = load_float32(theta, name) - sent
        there = self._folder / "there"
        there.write_bytes(tensor_bytes(moved))
        return coded.stat().st_size, there


def _dct(values: Any, *, inverse: bool) -> Any:
    """Return the DCT of blocks of 64 by 64 of the last two dimensions, which both are multiples of it."""
    from scipy.fft import dctn, idctn

    *outer, rows, columns = values.shape
    blocks = values.reshape(*outer, rows // DCT, DCT, columns // DCT, DCT)
    turn = idctn if inverse else dctn
    return np.asarray(turn(blocks, axes=(-3, -1), norm="ortho"), np.float32).reshape(values.shape)


def _upload(folder: Path, name: str) -> dict[str, float]:
    """Return bytes of one upload in the demo's shapes, and how many times fewer than rows and than the dense model."""
    path = folder / f"upload-{name.replace(' ', '-').replace('%', 'percent')}.txt"
    rows = 4 * LAYERS * sum(int(np.prod(shape)) for _, shape in DEMO_SHAPES.values())
    if not path.exists() and name != "rows":
        note(f"an upload in the demo's shapes: {name}")
        with tempfile.TemporaryDirectory() as work:
            write_coded(codec_of(ARMS[name].policy), DEMO_SHAPES, _noise, Path(work) / "coded")
            path.write_text(str(LAYERS * (Path(work) / "coded").stat().st_size))
    size = rows if name == "rows" else int(path.read_text())
    return {"bytes": size, "fewer_than_rows": round(rows / size, 1), "fewer_than_dense": round(DEMO_DENSE / size)}


def _noise(name: str) -> Any:
    shape = DEMO_SHAPES[name][1]
    return np.random.default_rng(sum(map(ord, name))).standard_normal(shape, np.float32) * np.float32(1e-3)


def _kept(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and interval over seeds of what each arm keeps, and by how many times fewer bytes than rows."""
    gains = {(row["arm"], row["steps"], row["data"], row["seed"]): row["start"] - row["end"] for row in rows}
    sizes = {(row["arm"], row["steps"], row["data"], row["seed"]): row["bytes"] for row in rows}
    found: dict[str, Any] = {}
    for arm, h, kind in sorted({key[:3] for key in gains}):
        seeds = [seed for a, b, c, seed in gains if (a, b, c) == (arm, h, kind) and ("rows", h, kind, seed) in gains]
        if seeds:
            kept = [gains[arm, h, kind, seed] / gains["rows", h, kind, seed] for seed in seeds]
            fewer = [sizes["rows", h, kind, seed] / sizes[arm, h, kind, seed] for seed in seeds]
            found[f"{arm}, H = {h}, {kind}"] = {
                "kept": [round(value, 4) for value in interval(kept)],
                "fewer": round(float(np.mean(fewer)), 1),
                "seeds": len(seeds),
            }
    return found


if __name__ == "__main__":
    main("wire", run, doc=__doc__, seeds=5)
