"""A long run on one machine: what its folders and its processes take, cycle by cycle, while older cycles are collected.

    python -m bench.soak --cycles 200 --kept 2

`connito up` on the tiny base, two miners and two validators, with `retention.cycles`. Nothing befalls it. Sampled when a cycle
opens: bytes of each folder as the disk has them, and each process's share of the memory. The document is written after every
sample, so a soak that is stopped has said what it saw; figures are what each cycle added, over the last half of the cycles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from connito.files import write_durably
from connito.local.defaults import UpOptions
from connito.local.memory import pss_bytes
from pydantic import TypeAdapter

from bench.chaos import Storm, judged
from bench.harness import machine, note

Row = dict[str, Any]
FOLDERS = ("objects", "nats", "cache", "cache-miners", "miners", "state", "logs", "losses")


class Soak(Storm):
    """A run of many cycles that nothing befalls."""

    kept = 2

    def start(self) -> None:
        """Start `connito up`, or go on with what one before has left."""
        self.begun.set()
        options = UpOptions(
            base="tiny", cycles=self.cycles, miners=2, validators=2, seed=self.seed, data_dir=self.folder,
            overrides=(f"retention.cycles={self.kept}", "training.local_steps=4"),
        )  # fmt: skip
        passed = TypeAdapter(UpOptions).dump_json(options).decode()
        with (self.folder / "up.log").open("ab") as log:
            self.up = subprocess.Popen([sys.executable, "-m", "connito.local.up", passed], stdout=log, stderr=log)

    def sample(self, cycle: int) -> Row:
        """Return what everything takes now."""
        assert self.up is not None
        pids = {name: int(row["pid"]) for name, row in self.data.read_pids().items()} | {"up": self.up.pid}
        return {
            "cycle": cycle, "seconds": round(time.monotonic() - self.opened[1], 1),
            "disk": {name: on_disk(self.folder / name) for name in FOLDERS},
            "memory": {name: pss_bytes(pid) for name, pid in sorted(pids.items())},
        }  # fmt: skip


def on_disk(folder: Path) -> int:
    """Return the bytes that the files below a folder take on the disk, a file of two names once."""
    seen: dict[int, int] = {}
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found = (Path(place) / name).lstat()
                seen[found.st_ino] = found.st_blocks * 512
    return sum(seen.values())


def slope(rows: list[Row], kind: str, name: str) -> float:
    """Return the bytes that a cycle adds, by least squares."""
    cycles, values = [float(row["cycle"]) for row in rows], [float(row[kind].get(name, 0)) for row in rows]
    return statistics.linear_regression(cycles, values).slope if len(rows) > 1 else 0.0


def figures(rows: list[Row]) -> dict[str, Any]:
    """Return what the last half of the cycles added, and where it stood."""
    half = [row for row in rows if row["cycle"] > rows[-1]["cycle"] / 2]
    last: dict[str, Any] = {"cycles": rows[-1]["cycle"] - 1, "seconds_a_cycle": 0.0}
    if rows[-1]["cycle"] > 1:
        last["seconds_a_cycle"] = round(rows[-1]["seconds"] / (rows[-1]["cycle"] - 1), 2)
    for kind in ("disk", "memory"):
        last[f"{kind}_mb"] = {name: round(size / 1e6, 2) for name, size in rows[-1][kind].items()}
        last[f"{kind}_kb_a_cycle"] = {name: round(slope(half, kind, name) / 1e3, 2) for name in rows[-1][kind]}
    return last


async def carry_out(soak: Soak, out: Path, until: float) -> Row:
    """Let the run go to its end or until the time is over; return the document."""
    rows: list[Row] = []
    soak.start()
    following = asyncio.create_task(soak.follow())
    document: Row = {}
    assert soak.up is not None
    try:
        while not soak.ended and soak.up.poll() is None and time.monotonic() < until:
            await asyncio.sleep(0.2)
            cycle = max(soak.opened, default=0)
            if cycle and (not rows or rows[-1]["cycle"] < cycle):
                rows.append(await asyncio.to_thread(soak.sample, cycle))
                settings = {"miners": 2, "validators": 2, "kept": soak.kept, "seed": soak.seed}
                document = {"name": "soak", "machine": machine(), "settings": settings, "rows": rows}
                document["figures"] = figures(rows) | {"ended": soak.ended}
                write_durably(out, json.dumps(document, indent=1) + "\n")
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        soak.up.terminate()
        soak.up.wait()
    document["figures"] |= {"ended": soak.ended, "wrong": await judged(soak)}
    write_durably(out, json.dumps(document, indent=1) + "\n")
    return document


def main() -> int:
    """Return the exit code: 6 when anything was lost, or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--kept", type=int, default=2, help="cycles whose artifacts are kept")
    parser.add_argument("--minutes", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/bench/soak.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-", ignore_cleanup_errors=True) as folder:
        soak = Soak(Path(folder), asked.seed, asked.cycles, "soak")
        soak.kept = asked.kept
        document = asyncio.run(carry_out(soak, asked.out, time.monotonic() + 60 * asked.minutes))
    note(json.dumps(document["figures"]))
    return 6 if document["figures"]["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
