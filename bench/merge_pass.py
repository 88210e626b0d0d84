"""Merging a cycle's files: seconds and CPU seconds of one merge, and CPU seconds of its parts, beside reading the files once.

Twenty submissions of random moves from one state, alone and with as many of the cycle before, which they are held against. Each
time is taken after the files were dropped from the kernel's cache, and the gate measures nothing. Forwards of a model,
fetching and unlocking are not in it. Products have one thread each, as services set it.

    OPENBLAS_NUM_THREADS=1 python -m bench.merge_pass --quick
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from connito.data.tensors import read_header
from connito.protocol.findings import PROTOCOL_VERSION
from connito.protocol.merging import aggregators, candidates, cycle, opened
from connito.protocol.merging.cycle import merge_cycle
from connito.protocol.merging.earlier import EarlierWork
from connito.protocol.merging.gate import Losses
from connito.protocol.merging.opened import Files
from connito.protocol.policy.law import DEFAULTS
from connito.protocol.scoring.consensus import Consensus
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from safetensors.numpy import load_file, save_file

from bench.harness import Options, Result, main, note
from tests.support.run import Run, ref

MINERS, LAYERS, EXPERTS = 20, 4, 4
STEPS = DEFAULTS.merging.step_codec
# What a merge consists of, by where it is called from.
PARTS = {
    "inspect": (opened, "inspect"),
    "functions": (cycle, "function_gram"),
    "step": (candidates, "write_step"),
    "coding": (aggregators, "code_step"),
}


def state(path: Path, width: int, seed: int, start: Path | None = None) -> Path:
    """Write a state, or one that has moved from another as a cycle moves it."""
    rng, tensors = np.random.default_rng(seed), {}
    for layer in range(LAYERS):
        for name, shape in (("gate_up_proj", (2 * width, width)), ("down_proj", (width, width))):
            tensors[f"layers.{layer}.{name}"] = rng.standard_normal((EXPERTS, *shape), np.float32)
    if start is not None:
        before = load_file(start)
        tensors = {name: before[name] + np.float32(1e-3) * moved for name, moved in tensors.items()}
    save_file(tensors, path)
    return path


def drop(paths: Sequence[Path]) -> None:
    """Have the kernel forget files."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_read(paths: Sequence[Path]) -> float:
    """Return seconds that reading files takes, one after the other, with nothing done to their bytes."""
    drop(paths)
    began, into = time.perf_counter(), bytearray(1 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(into):
                pass
    return time.perf_counter() - began


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Sum the CPU seconds of each part while a merge goes on."""

    def wrapped(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            began = time.process_time()
            try:
                return work(*args, **kw)
            finally:
                spent[name] += time.process_time() - began

        return call

    patches = [
        mock.patch.object(module, attribute, wrapped(name, getattr(module, attribute)))
        for name, (module, attribute) in PARTS.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


def facts(parent: ArtifactRef, entries: Sequence[cycle_pb2.Submission]) -> Run:
    """Return a run of which a second cycle is to be merged."""
    run = Run()
    merging = run_pb2.MergePolicy(aggregator="mean", outer_learning_rate=0.7, outer_momentum=0.9, step_codec=STEPS)
    scoring = run_pb2.ScorePolicy(
        paid_ranks=10, copy_threshold=0.98, copy_span_threshold=0.5, copy_effect_threshold=0.5
    )
    spec = run.spec(cycles=9, protocol_version=PROTOCOL_VERSION, emission=100, merging=merging, scoring=scoring)
    run.created(spec).selected(initial_state=parent)
    for number in (1, 2):
        run.opened("train", number, (), state=parent)
    run.settled("submit", 2, submissions=list(entries))
    run.drawn("VA", cycle=2, seed=b"s" * 32)
    return run


def submissions(paths: Sequence[Path], number: int, parent: ArtifactRef) -> list[cycle_pb2.Submission]:
    """Return what their miners revealed."""
    return [
        cycle_pb2.Submission(
            miner=f"M{place:03}", origin_cycle=number, base_state=parent, commit_sequence=100 * number + place,
            reveal_sequence=100 * number + 50 + place,
            artifact=ArtifactRef(digest=hashlib.sha256(path.name.encode()).hexdigest(), realm=REALM_SUBMISSION),
        )
        for place, path in enumerate(paths)
    ]  # fmt: skip


def run(options: Options) -> Result:
    """Merge with and without works of an earlier cycle, several times."""
    width, rounds = (256, 3) if options.quick else (512, 5)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="connito-bench-") as name:
        folder = Path(name)
        parent = state(folder / "parent", width, 0)
        now = [state(folder / f"now-{place}", width, 1 + place, parent) for place in range(MINERS)]
        before = [state(folder / f"before-{place}", width, 101 + place, parent) for place in range(MINERS)]
        size = now[0].stat().st_size
        note(f"{MINERS} files of {size / 1e6:.1f} MB, {len(read_header(parent).entries)} tensors")
        for number in range(rounds):
            for kind, earlier in (("first cycle", before[:0]), ("later cycle", before)):
                rows.append({"kind": kind, "round": number, **_once(folder, parent, now, earlier, number)})
                note(str(rows[-1]))
    figures: dict[str, Any] = {"submissions": MINERS, "megabytes_each": round(size / 1e6, 1)}
    for kind in ("first cycle", "later cycle"):
        mine = [row for row in rows if row["kind"] == kind]
        for what in ("cold_read", "merge", "ratio", "cpu", *PARTS):
            figures[f"{kind}, {what}"] = round(statistics.median(row[what] for row in mine), 3)
    return Result({"miners": MINERS, "width": width, "rounds": rounds}, rows, figures)


def _once(folder: Path, parent: Path, now: Sequence[Path], before: Sequence[Path], number: int) -> dict[str, float]:
    theta = ref("5" * 64, parent.stat().st_size)
    entries = submissions(now, 2, theta)
    earlier = [
        EarlierWork(entry, path, parent) for entry, path in zip(submissions(before, 1, theta), before, strict=True)
    ]
    told = facts(theta, entries).facts
    agreed = Consensus(utilities={entry.miner: 0.1 + place / 100 for place, entry in enumerate(entries)}, reasons={})
    files = Files(
        parent, None, {entry.miner: path for entry, path in zip(entries, now, strict=True)},
        {entry.miner: parent for entry in entries}, earlier,
    )  # fmt: skip
    cold = cold_read([parent, *now, *before])
    drop([parent, *now, *before])
    out, spent = folder / f"out-{number}-{len(before)}", dict.fromkeys(PARTS, 0.0)
    out.mkdir()
    losses = Losses({"medical": (1.0, 1)})
    began, cpu = time.perf_counter(), time.process_time()
    with timed(spent):
        merged = merge_cycle(told, 2, entries, agreed, {}, files, lambda *_: losses, out)
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert merged.version.gate == cycle_pb2.GATE_DECISION_ACCEPTED, merged.version
    for path in out.iterdir():
        path.unlink()
    return {"cold_read": cold, "merge": took, "cpu": cpu, "ratio": took / cold, **spent}


if __name__ == "__main__":
    main("merge_pass", run, doc=__doc__)
