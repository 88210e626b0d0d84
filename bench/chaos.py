"""Storms over a whole `connito up`: what is lost, and how long it is until the log goes on.

    python -m bench.chaos --only storm --faults 1000 --minutes 14
    python -m bench.chaos --only cluster
    python -m bench.chaos --only away --away 180

`storm`: runs on the tiny base, each with a seed of its own that chooses what befalls it: a process is killed (now and then
the whole `connito up`, which is then started again) or stopped for some seconds, the disk is full for a while, a bit of a
cached file flips, an object is gone from the store and comes back. `cluster`: the same run over a broker of three nodes with
three copies of every stream, `calm`, with a node killed every five seconds, and `current`: with one killed as soon after
five seconds as all nodes have caught up. `single`: one process is killed, any of them, and the next one within three
seconds of the log having gone on. `away`: once, from the second cycle on, the store, the broker or both cannot be reached for a
while. Each run ends with an audit, and with a check that every acknowledged reveal has one
answer and every cycle one version.

Figures add up over calls: what was carried out stays in the document, storms begin with the seed after the last one there, and
end when all of them together had `--faults`, or after `--minutes`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from connito.audit.access import opened
from connito.bus import CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.errors import ConnitoError, Invalid
from connito.files import write_durably
from connito.local.defaults import UpOptions
from connito.platform.datadir import DataDir
from connito.platform.session import Session
from connito.runtime.tasks import end_tasks
from connito.wire.log import Log
from pydantic import TypeAdapter

from bench.chaos_faults import SHARES, Faults, small_disk
from bench.harness import machine, note
from tests.sim.checks import conserved

# Seconds: between faults on average, between kills of a node, and at most for one run.
EVERY, NODE_EVERY, LONGEST = 1.5, 5.0, 900.0
# By part: seconds between kills of a node (none where 0), and whether to wait until all nodes are current.
CLUSTERS = {"cluster calm": (0.0, False), "cluster": (NODE_EVERY, False), "cluster current": (NODE_EVERY, True)}
# By part: which servers are away, all of them for `--away` seconds.
OUTAGES = {"away store": ["weed"], "away broker": ["nats-server"], "away both": ["nats-server", "weed"]}
# One kill after the other: seconds at most from the log going on until the next one.
SINGLE, PAUSE = "single", 3.0
# A command that ends so often although nobody ended it will not get better.
MOST_ENDS, NOT_ENDED = 5, "the run has not ended"
Row = dict[str, Any]


@dataclass
class Storm:
    """One run on one machine, what befalls it, and when its log goes on."""

    folder: Path
    seed: int
    cycles: int
    part: str
    own_disk: bool = False
    facts: list[float] = field(default_factory=list)
    opened: dict[int, float] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    ended: bool = False
    run: str = ""
    away: float = 0.0

    def __post_init__(self) -> None:
        self.data, self.cluster = DataDir.open(self.folder), self.part in CLUSTERS
        self.faults = Faults(self.data, self.seed, self._kill_everything, own_disk=self.own_disk)
        self.up: subprocess.Popen[bytes] | None = None
        self.begun = asyncio.Event()

    def _kill_everything(self) -> None:
        assert self.up is not None
        self.up.kill()
        self.up.wait()
        self.start()

    def start(self) -> None:
        """Start `connito up`, or go on with what one before has left."""
        self.begun.set()
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
            self.begun.clear()
            tasks = [asyncio.create_task(work) for work in (self._follow(), self.begun.wait())]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                await end_tasks(tasks)
            await asyncio.sleep(0.1)

    async def _follow(self) -> None:
        """Follow one broker: the next `connito up` has another, at another address."""
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

    def _note(self, section: str, cycle: int, kind: str, run: str, *, new: bool) -> None:
        self.run = run
        if new:
            self.facts.append(time.monotonic())
        if (section, kind) == ("train", "opened"):
            self.opened.setdefault(cycle, time.monotonic())
        self.ended = self.ended or (section, kind) == ("library", "deposited") or (section, kind) == ("run", "ended")

    async def strike(self) -> None:
        """Let one fault happen."""
        if self.cluster:
            await self.faults.node(wait=CLUSTERS[self.part][1])
        else:
            await self.faults.strike()

    def waits_for_more(self) -> bool:
        """Return whether nothing has come since the last kill."""
        return bool(self.faults.kills) and max(self.facts, default=0.0) <= self.faults.kills[-1]

    def waits(self) -> list[float]:
        """Return by kill the seconds until the log went on; of kills after the last fact, none."""
        found, rest = [], iter(sorted(self.facts))
        fact = next(rest, None)
        for kill in sorted(self.faults.kills):
            while fact is not None and fact <= kill:
                fact = next(rest, None)
            if fact is not None:
                found.append(fact - kill)
        return found


async def weather(storm: Storm, every: float, faults: int, until: float) -> None:
    """Strike as often as asked for, from the first cycle on."""
    while not storm.opened:  # noqa: ASYNC110 - what sets it reads a log, and is cancelled with it
        await asyncio.sleep(0.05)
    if storm.part in OUTAGES:
        while max(storm.opened) < 2:  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.05)
        await storm.faults.away(OUTAGES[storm.part], storm.away)
        return
    if storm.part == SINGLE:
        await one_by_one(storm, faults, until)
        return
    while every and not storm.ended and storm.faults.counts.total() < faults and time.monotonic() < until:
        await asyncio.sleep(every if storm.cluster else storm.faults.rng.uniform(0.5, 1.5) * every)
        with suppress(OSError, ValueError):
            await storm.strike()


async def one_by_one(storm: Storm, faults: int, until: float) -> None:
    """Kill a process, and the next one when the log has gone on."""
    while not storm.ended and storm.faults.counts.total() < faults and time.monotonic() < until:
        await asyncio.sleep(storm.faults.rng.uniform(0.0, PAUSE))
        with suppress(OSError, ValueError):
            storm.faults.one()
        while not storm.ended and storm.waits_for_more():  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)


async def carry_out(storm: Storm, every: float, faults: int, until: float) -> Row:
    """Let a run go through its storm; return what came of it."""
    storm.start()
    tasks = [asyncio.create_task(storm.follow()), asyncio.create_task(weather(storm, every, faults, until))]
    began = time.monotonic()
    try:
        while not storm.ended and time.monotonic() - began < LONGEST and len(storm.ends) < MOST_ENDS:
            await asyncio.sleep(0.2)
            assert storm.up is not None
            if storm.up.poll() is not None:
                # What its operator would do.
                said = (storm.folder / "up.log").read_text()[-600:]
                storm.ends.append(f"{storm.up.returncode}: {said}")
                note(f"connito up ended with {storm.ends[-1]}")
                storm.start()
        tasks[1].cancel()
        async with asyncio.timeout(60):
            await storm.faults.over()
        # The library and the report have their facts, too.
        await asyncio.sleep(3.0)
        wrong = await judged(storm) if storm.cluster else []
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert storm.up is not None
        storm.up.terminate()
        storm.up.wait()
    if not storm.cluster:
        wrong = await judged(storm)
    if not storm.ended:
        wrong.append(f"{NOT_ENDED} after {time.monotonic() - began:.0f} s")
    spans = sorted(storm.opened.values())
    cycles, counts = len(spans) - 1, storm.faults.counts
    return {
        "part": storm.part, "seed": storm.seed, "every": every, "cycles": cycles, "faults": dict(counts), "ends": storm.ends,
        "ended": storm.ended, "wrong": wrong, "waits": [round(wait, 2) for wait in sorted(storm.waits())],
        "slowest": sorted(zip(map(partial(round, ndigits=2), storm.waits()), storm.faults.killed, strict=False))[-5:],
        "seconds_a_cycle": round((spans[-1] - spans[0]) / cycles, 2) if cycles > 0 else None,
    }  # fmt: skip


async def judged(storm: Storm) -> list[str]:
    """Return everything that is wrong with the log of a run, and with what an audit makes of it.

    A broker of several nodes is read while it runs; otherwise what lies in the folder is read, after everything has ended.
    """
    folder, data_dir = (None, storm.folder) if storm.cluster else (storm.folder, None)
    try:
        async with opened(folder, data_dir) as access:
            evidence = await access.evidence(storm.run)
        wrong = list(conserved(evidence))
        storm.ended = evidence.facts.ended is not None
    except ConnitoError as error:
        return [f"cannot be read: {error}"]
    audit = [sys.executable, "-m", "connito.cli", "audit", storm.run]
    audit += ["--data-dir" if storm.cluster else "--from", str(storm.folder)]
    done = await asyncio.create_subprocess_exec(*audit, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out, _ = await done.communicate()
    return wrong if done.returncode == 0 else [*wrong, f"audit: {out.decode()[-300:]}"]


def one(part: str, seed: int, cycles: int, every: float, faults: int, until: float, away: float = 0.0) -> Row:
    """Carry out one run in a folder that goes with it."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        own_disk = part == "storm" and stack.enter_context(small_disk(Path(name)))
        storm = Storm(Path(name), seed, cycles, part, own_disk, away=away)
        row = asyncio.run(carry_out(storm, CLUSTERS[part][0] if part in CLUSTERS else every, faults, until))
        if row["wrong"]:
            kept = Path(tempfile.mkdtemp(prefix=f"chaos-wrong-{seed}-"))
            shutil.copytree(storm.data.logs, kept / "logs")
            note(f"logs are kept in {kept}")
    note(str({key: value for key, value in row.items() if key != "waits"}))
    return row


def total(rows: list[Row]) -> Row:
    """Return what all storms together come to."""
    storms = [row for row in rows if row["part"] == "storm"]
    counts = sum((Counter(row["faults"]) for row in storms), Counter[str]())
    waits = sorted(wait for row in storms for wait in row["waits"])
    return {
        "runs": len(storms), "cycles": sum(row["cycles"] for row in storms), "faults": counts.total(), "by_kind": dict(counts),
        "ended": sum(row["ended"] for row in storms), "wrong": sum(bool(row["wrong"]) for row in storms),
        "commands_that_ended": sum(len(row["ends"]) for row in storms),
        "median_s": statistics.median(waits) if waits else None,
        "p99_s": waits[min(len(waits) - 1, int(0.99 * len(waits)))] if waits else None,
    }  # fmt: skip


def keep(out: Path, row: Row) -> list[Row]:
    """Put a row into the document, in place of one that is the same run; return all rows."""
    rows = known(out)
    rows = [one for one in rows if (one["part"], one["seed"]) != (row["part"], row["seed"])] + [row]
    settings = {"miners": 2, "validators": 2, "node_every": NODE_EVERY, "shares": SHARES}
    document = {"name": "chaos", "machine": machine(), "settings": settings, "storms": total(rows), "rows": rows}
    write_durably(out, json.dumps(document, indent=1) + "\n")
    return rows


def known(out: Path) -> list[Row]:
    """Return the rows of what was carried out before."""
    return list(json.loads(out.read_text())["rows"]) if out.exists() else []


def carry_on(asked: argparse.Namespace) -> list[Row]:
    """Carry out the parts whose names begin with `only`; return the rows of this call."""
    fresh: list[Row] = []
    until = time.monotonic() + 60 * asked.minutes
    for part in ("storm", *CLUSTERS, SINGLE, *OUTAGES):
        if not (part == asked.only if asked.exactly else part.startswith(asked.only)):
            continue
        if part in CLUSTERS:
            fresh.append(one(part, asked.first, asked.cycles, asked.every, 10**6, until))
            keep(asked.out, fresh[-1])
            continue
        if part == SINGLE:
            fresh.append(one(part, asked.first, asked.cycles, asked.every, asked.faults, until))
            keep(asked.out, fresh[-1])
            continue
        if part in OUTAGES:
            fresh.append(one(part, asked.first, asked.cycles, asked.every, 1, until, asked.away))
            keep(asked.out, fresh[-1])
            continue
        rows = known(asked.out)
        while (done := total(rows)["faults"]) < asked.faults and time.monotonic() < until:
            seed = max((row["seed"] for row in rows if row["part"] == "storm"), default=asked.first - 1) + 1
            fresh.append(one(part, seed, asked.cycles, asked.every, asked.faults - done, until))
            rows = keep(asked.out, fresh[-1])
            note(str(total(rows)))
    return fresh


def main() -> int:
    """Return the exit code: 6 when anything was lost, or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="how the names of the parts begin: storm, cluster, cluster calm, …")
    parser.add_argument("--exactly", action="store_true", help="the part of just that name")
    parser.add_argument("--faults", type=int, default=1000, help="of all storms together")
    parser.add_argument("--minutes", type=float, default=600.0, help="no fault comes after so long")
    parser.add_argument("--cycles", type=int, default=20, help="of each run")
    parser.add_argument("--every", type=float, default=EVERY, help="seconds between the faults of a storm")
    parser.add_argument("--away", type=float, default=180.0, help="seconds that an outage lasts")
    parser.add_argument("--from", type=int, default=1, dest="first", help="the first seed")
    parser.add_argument("--out", type=Path, default=Path("out/bench/chaos.json"))
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    return 6 if any(row["wrong"] for row in carry_on(asked)) else 0


if __name__ == "__main__":
    raise SystemExit(main())
