"""Storms over a whole `connito up`: what is lost, and how long it is until the log goes on.

    python -m bench.chaos --only storm --faults 200
    python -m bench.chaos --only cluster

`storm`: runs on the tiny base; a seed chooses which process is killed (SIGKILL, now and then the whole `connito up`, which
is then started again) or stopped for some seconds. `cluster`: the same run over a broker of three nodes with three copies of
every stream, once undisturbed and once with a node killed every five seconds. Each run ends with an audit, and with a check
that every acknowledged reveal has one answer and every cycle one version. Parts that were carried out before stay in the
document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connito.audit.access import opened
from connito.bus import CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.errors import ConnitoError, Invalid, NotFound
from connito.local.defaults import UpOptions
from connito.platform.datadir import DataDir
from connito.platform.session import Session
from connito.wire.log import Log
from pydantic import TypeAdapter

from bench.harness import machine, note
from tests.sim.checks import conserved

# Seconds: between faults on average, of a process that is stopped, between kills of a node, and at most for one run.
EVERY, STOPPED, NODE_EVERY, LONGEST = 1.5, (1.0, 4.0), 5.0, 900.0
STOPS, WHOLE = 0.15, 0.03
Row = dict[str, Any]


@dataclass
class Storm:
    """One run on one machine, what befalls it, and when its log goes on."""

    folder: Path
    seed: int
    cycles: int
    cluster: bool = False
    facts: list[float] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    stops: int = 0
    opened: dict[int, float] = field(default_factory=dict)
    ended: bool = False
    run: str = ""

    def __post_init__(self) -> None:
        self.data, self.rng = DataDir.open(self.folder), random.Random(self.seed)
        self.up: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start `connito up`, or go on with what one before has left."""
        options = UpOptions(
            base="tiny", cycles=self.cycles, miners=2, validators=2, seed=self.seed, data_dir=self.folder
        )
        passed = TypeAdapter(UpOptions).dump_json(options).decode()
        module = "bench.chaos_cluster" if self.cluster else "connito.local.up"
        with (self.folder / "up.log").open("ab") as log:
            self.up = subprocess.Popen([sys.executable, "-m", module, passed], stdout=log, stderr=log)

    async def follow(self) -> None:
        """Note when each fact came, through every restart."""
        while True:
            with suppress(ConnitoError, OSError):
                session = Session.open(self.folder, role="operator")
                log = Log(session.roster)
                async with session.bus() as bus, aclosing(bus.follow(FACT_STREAMS)) as records:
                    new = False
                    async for item in records:
                        if isinstance(item, CaughtUp):
                            new = True
                            continue
                        with suppress(Invalid):
                            fact = log.apply(item)
                            if fact is not None:
                                self._note(fact.key.section, fact.key.cycle, fact.key.kind, fact.run, new=new)
            await asyncio.sleep(0.1)

    def _note(self, section: str, cycle: int, kind: str, run: str, *, new: bool) -> None:
        self.run = run
        if new:
            self.facts.append(time.monotonic())
        if (section, kind) == ("train", "opened"):
            self.opened.setdefault(cycle, time.monotonic())
        self.ended = self.ended or (section, kind) == ("library", "deposited") or (section, kind) == ("run", "ended")

    def strike(self) -> None:
        """Kill or stop one process, or everything."""
        if self.cluster:
            pids = json.loads((self.folder / "nats" / "nodes.json").read_text())
            self._signal(self.rng.choice(pids), signal.SIGKILL)
            return
        assert self.up is not None
        if self.rng.random() < WHOLE:
            self.up.kill()
            self.up.wait()
            self.kills.append(time.monotonic())
            self.start()
            return
        rows = self.data.read_pids()
        if not rows:
            return
        pid = rows[self.rng.choice(sorted(rows))]["pid"]
        if self.rng.random() < STOPS:
            self.stops += 1
            self._signal(pid, signal.SIGSTOP)
            after = self.rng.uniform(*STOPPED)
            asyncio.get_running_loop().call_later(after, self._signal, pid, signal.SIGCONT)
        else:
            self._signal(pid, signal.SIGKILL)

    def _signal(self, pid: int, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            if number == signal.SIGKILL:
                self.kills.append(time.monotonic())

    def waits(self) -> list[float]:
        """Return by kill the seconds until the log went on; of kills after the last fact, none."""
        found, rest = [], iter(sorted(self.facts))
        fact = next(rest, None)
        for kill in sorted(self.kills):
            while fact is not None and fact <= kill:
                fact = next(rest, None)
            if fact is not None:
                found.append(fact - kill)
        return found


async def weather(storm: Storm, every: float, faults: int) -> None:
    """Strike as often as asked for, from the first cycle on."""
    while not storm.opened:  # noqa: ASYNC110 - what sets it reads a log, and is cancelled with it
        await asyncio.sleep(0.05)
    while not storm.ended and len(storm.kills) + storm.stops < faults:
        await asyncio.sleep(every if storm.cluster else storm.rng.uniform(0.5, 1.5) * every)
        with suppress(OSError, ValueError):
            storm.strike()


async def carry_out(storm: Storm, every: float, faults: int) -> Row:
    """Let a run go through its storm; return what came of it."""
    storm.start()
    tasks = [asyncio.create_task(storm.follow()), asyncio.create_task(weather(storm, every, faults))]
    began = time.monotonic()
    try:
        while not storm.ended and time.monotonic() - began < LONGEST:
            await asyncio.sleep(0.2)
            assert storm.up is not None
            if storm.up.poll() is not None:
                note(f"connito up ended with {storm.up.returncode}: {(storm.folder / 'up.log').read_text()[-600:]}")
                break
        await asyncio.sleep(3.0)
        wrong = await judged(storm)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert storm.up is not None
        storm.up.terminate()
        storm.up.wait()
    spans = sorted(storm.opened.values())
    cycles = len(spans) - 1
    waits = sorted(storm.waits())
    return {
        "part": "cluster" if storm.cluster else "storm", "seed": storm.seed, "cycles": cycles, "kills": len(storm.kills),
        "stops": storm.stops, "ended": storm.ended, "wrong": wrong, "waits": [round(wait, 2) for wait in waits],
        "seconds_a_cycle": round((spans[-1] - spans[0]) / cycles, 2) if cycles > 0 else None,
    }  # fmt: skip


async def judged(storm: Storm) -> list[str]:
    """Return everything that is wrong with the log of a run, and with what an audit makes of it."""
    try:
        async with opened(None, storm.folder) as access:
            wrong = list(conserved(await access.evidence(storm.run)))
    except (NotFound, ConnitoError) as error:
        return [f"cannot be read: {error}"]
    audit = [sys.executable, "-m", "connito.cli", "audit", storm.run, "--data-dir", str(storm.folder)]
    done = await asyncio.create_subprocess_exec(*audit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = await done.communicate()
    return wrong if done.returncode == 0 else [*wrong, f"audit: {out.decode()[-300:]}"]


def parts(only: str, faults: int, cycles: int, first: int) -> list[Row]:
    """Carry out the parts whose names hold `only`."""
    rows: list[Row] = []
    for name, cluster, every in (("storm", False, EVERY), ("cluster calm", True, 0.0), ("cluster", True, NODE_EVERY)):
        if only not in name:
            continue
        left, seed = faults if name == "storm" else 1, first
        while left > 0:
            most = left if name == "storm" else (0 if not every else 10**6)
            with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
                row = asyncio.run(carry_out(Storm(Path(folder), seed, cycles, cluster), every, most))
            rows.append({**row, "part": name})
            note(str({key: value for key, value in rows[-1].items() if key != "waits"}))
            left, seed = left - (row["kills"] + row["stops"] or left if name == "storm" else 1), seed + 1
    return rows


def main() -> int:
    """Return the exit code: 6 when anything was lost, or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="storm, cluster or cluster calm")
    parser.add_argument("--faults", type=int, default=1000, help="of all storms together")
    parser.add_argument("--cycles", type=int, default=20, help="of each run")
    parser.add_argument("--from", type=int, default=1, dest="first", help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("out/bench/chaos.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    rows = parts(asked.only, asked.faults, asked.cycles, asked.first)
    before = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    again = {(row["part"], row["seed"]) for row in rows}
    kept = [row for row in before if (row["part"], row["seed"]) not in again]
    document = {
        "name": "chaos",
        "machine": machine(),
        "settings": {"miners": 2, "validators": 2, "every": EVERY, "node_every": NODE_EVERY},
        "rows": kept + rows,
    }
    asked.out.write_text(json.dumps(document, indent=1) + "\n")
    return 6 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
