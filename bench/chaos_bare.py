"""A broker of three nodes without Connito, under the same kills: what it leaves to anybody who writes to it.

    python -m bench.chaos_bare --seconds 60

One plain client publishes a message to each stream in turn, again until it is acknowledged, as the windows of a cycle follow
each other; there is no other load, no consumer and no account. `calm` kills nobody, `every` kills a node every so many
seconds, `current` as soon after that as all nodes have caught up. Afterwards: seconds until all nodes are current and a round
goes through.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats
from connito.bus import streams
from connito.wire.subjects import ROOT
from nats.js import JetStreamContext

from bench.chaos_cluster import NODES, Cluster, lag
from bench.harness import machine, note

WINDOWS = ("run", "train", "commit", "submit", "validate", "merge", "library")
Row = dict[str, Any]


async def rounds(js: JetStreamContext, done: list[float], pace: float) -> None:
    """Publish a message to each stream in turn, `pace` seconds after the one before; note when each round was complete."""
    while True:
        for window in WINDOWS:
            await asyncio.sleep(pace)
            subject = f"{ROOT}.bare.{window}.{len(done)}.opened"
            while True:
                with suppress(Exception):
                    await js.publish(subject, bytes(200), timeout=2)
                    break
                await asyncio.sleep(0.1)
        done.append(time.monotonic())


async def killing(cluster: Cluster, seed: int, every: float, wait: bool, kills: list[float]) -> None:
    """Kill a node every so many seconds; with `wait` not before all are current."""
    rng = random.Random(seed)
    while every:
        await asyncio.sleep(every)
        if wait:
            await asyncio.to_thread(wait_until_current, cluster)
        with suppress(ProcessLookupError):
            os.kill(rng.choice(cluster.nodes).pid, signal.SIGKILL)
            kills.append(time.monotonic())


async def _silent(error: Exception) -> None:
    """Say nothing of connections that break: they are what is tried here."""


def wait_until_current(cluster: Cluster) -> None:
    """Return when no node has anything to catch up with, or after two minutes."""
    give_up = time.monotonic() + 120
    while any(lag(node.monitor) for node in cluster.nodes) and time.monotonic() < give_up:
        time.sleep(0.1)


async def carry_out(part: str, seconds: float, every: float, seed: int, pace: float) -> Row:
    """Write for so many seconds, kill meanwhile, and then wait for the cluster to be whole."""
    done: list[float] = []
    kills: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bare-") as folder:
        cluster = Cluster(Path(folder))
        await asyncio.to_thread(cluster.start)
        nc = await nats.connect(
            cluster.url.split(","), max_reconnect_attempts=-1, reconnect_time_wait=0.25, error_cb=_silent
        )
        try:
            await streams.ensure(nc.jetstream(timeout=10), replicas=NODES)
            began = time.monotonic()
            tasks = [
                asyncio.create_task(rounds(nc.jetstream(), done, pace)),
                asyncio.create_task(killing(cluster, seed, 0.0 if part == "calm" else every, part == "current", kills)),
            ]
            await asyncio.sleep(seconds)
            tasks[1].cancel()
            over, before = time.monotonic(), len(done)
            await asyncio.to_thread(wait_until_current, cluster)
            async with asyncio.timeout(120):
                while len(done) == before:  # noqa: ASYNC110 - what counts them publishes, and is cancelled with it
                    await asyncio.sleep(0.1)
            whole = time.monotonic() - over
            tasks[0].cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await nc.close()
            await asyncio.to_thread(cluster.stop)
    times = [began, *(at for at in done if at <= over), over]
    return {
        "part": part, "seed": seed, "every": every, "pace": pace, "seconds": seconds, "rounds": before, "kills": len(kills),
        "longest_silence": round(max(b - a for a, b in itertools.pairwise(times)), 1),
        "whole_after": round(whole, 1),
    }  # fmt: skip


def main() -> None:
    """Print a row for each part, and put it into the document, in place of one of the same part, seed, rhythm and pace."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=5.0)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between messages")
    parser.add_argument("--parts", default="calm,every,current")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/bench/chaos_bare.json"))
    asked = parser.parse_args()
    rows: list[Row] = json.loads(asked.out.read_text())["rows"] if asked.out.exists() else []
    for part in asked.parts.split(","):
        row = asyncio.run(carry_out(part, asked.seconds, asked.every, asked.seed, asked.pace))
        same = ("part", "seed", "every", "pace")
        rows = [one for one in rows if any(one[name] != row[name] for name in same)] + [row]
        note(str(row))
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"nodes": NODES, "streams": len(WINDOWS)}
    document = {"name": "chaos_bare", "machine": machine(), "settings": settings, "rows": rows}
    asked.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
