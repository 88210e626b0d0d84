"""The console under load: how late an open page shows what was published, at 10,000 events a minute.

A real broker, the console as a process, and readers that hold the list of runs open as a browser does. Each second a run is
created, followed by its share of enrolments; what counts is from the acknowledgement of the run's first fact to the
picture that names it, at the slowest reader.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from connito.bus import Bus, streams
from connito.platform.servers import NatsServer
from connito.v1 import run_pb2, services_pb2
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.roster import ROLES, Roster
from connito.wire.verification import ENROL_SUBJECT

from bench.harness import Options, Result, main, note

EVENTS_A_MINUTE = 10_000


class Reader(threading.Thread):
    """An open page. `seen` is when each run was first in a picture."""

    def __init__(self, address: str) -> None:
        super().__init__(daemon=True)
        self._address = address
        self.seen: dict[str, float] = {}
        self.pictures = 0
        self.ready = threading.Event()

    def run(self) -> None:
        """Read pictures until the console ends."""
        request = urllib.request.Request(self._address, headers={"Accept": "text/event-stream"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request) as answer:
            for line in answer:
                if line.startswith(b"event: live"):
                    self.pictures += 1
                    self.ready.set()
                elif line.startswith(b"data: ") and b"/runs/run-" in line:
                    name = line.partition(b"/runs/")[2].partition(b'"')[0].decode()
                    self.seen.setdefault(name, time.monotonic())


@contextmanager
def console(folder: Path, url: str, identity: Identity, roster: Roster) -> Iterator[tuple[psutil.Process, str]]:
    """Yield the process and its address."""
    identity.save(folder / "key")
    roster.save(folder / "roster.json")
    environment = {
        **os.environ,
        "CONNITO_NATS_URL": url,
        "CONNITO_KEY_FILE": str(folder / "key"),
        "CONNITO_ROSTER": str(folder / "roster.json"),
        "CONNITO_PORT_FILE": str(folder / "ports.json"),
        "CONNITO_LOG_LEVEL": "warning",
    }
    with subprocess.Popen([sys.executable, "-m", "services.console"], env=environment) as process:
        try:
            give_up = time.monotonic() + 30
            ports: dict[str, Any] = {}
            while "console" not in ports:
                assert time.monotonic() < give_up, "the console did not start"
                time.sleep(0.05)
                path = folder / "ports.json"
                ports = json.loads(path.read_text() or "{}") if path.exists() else {}
            yield psutil.Process(process.pid), f"http://127.0.0.1:{ports['console']}/"
        finally:
            process.terminate()


async def feed(bus: Bus, seconds: int) -> tuple[dict[str, float], int, float]:
    """Publish for `seconds`; when each run's first fact was acknowledged, how many facts there were, how long it took."""
    published: dict[str, float] = {}
    miners = [Identity.generate() for _ in range(EVENTS_A_MINUTE // 60)]
    count, began = 0, time.monotonic()
    async with asyncio.TaskGroup() as group:
        for second in range(seconds):
            run = f"run-{second}"
            spec = run_pb2.RunSpec(run=run, domain="medical", cycles=1, base=run_pb2.BaseRef(name="tiny"))
            await bus.publish_fact(run, "run", 0, "created", run_pb2.RunCreated(spec=spec))
            published[run] = time.monotonic()
            for miner in miners:
                order = seal(miner, ENROL_SUBJECT, services_pb2.EnrolMinerCommand(run=run))
                enrolled = run_pb2.MinerEnrolled(run=run, miner=miner.public, order=order)
                group.create_task(bus.publish_fact(run, "run", 0, "miner", enrolled, miner.public))
            count += 1 + len(miners)
            await asyncio.sleep(max(0.0, began + second + 1 - time.monotonic()))
    return published, count, time.monotonic() - began


def run(options: Options) -> Result:
    """Measure once; the delays of every run are those of the slowest reader."""
    seconds, readers = (15, 4) if options.quick else (60, 8)
    identities = {role: Identity.generate() for role in ROLES}
    roster = Roster({role: frozenset({identity.public}) for role, identity in identities.items()})
    with tempfile.TemporaryDirectory(prefix="connito-bench-") as scratch, NatsServer(Path(scratch) / "nats") as nats:
        return asyncio.run(_measure(Path(scratch), nats.url, identities, roster, seconds, readers))


async def _measure(
    folder: Path, url: str, identities: dict[str, Identity], roster: Roster, seconds: int, readers: int
) -> Result:
    async with await Bus.connect(url, identities["coordinator"], "bench", roster) as bus:
        await streams.ensure(bus.js)
        with console(folder, url, identities["customer"], roster) as (process, address):
            pages = [Reader(address) for _ in range(readers)]
            for page in pages:
                page.start()
                await asyncio.to_thread(page.ready.wait, 30)
            note(f"{readers} pages are open; publishing for {seconds} s")
            before = process.cpu_times()
            published, count, took = await feed(bus, seconds)
            after = process.cpu_times()
            await asyncio.to_thread(_until_seen, pages, set(published))
            memory = process.memory_info().rss
    delays = [max(page.seen[name] for page in pages) - at for name, at in published.items()]
    rows = [{"run": name, "delay_seconds": round(delay, 3)} for name, delay in zip(published, delays, strict=True)]
    figures = {
        "events_a_minute": round(60 * count / took),
        "shown_after_seconds_median": round(statistics.median(delays), 3),
        "shown_after_seconds_max": round(max(delays), 3),
        "pictures_a_second_and_reader": round(sum(page.pictures for page in pages) / readers / took, 2),
        "console_cores": round((after.user + after.system - before.user - before.system) / took, 2),
        "console_memory_mb": round(memory / 1e6),
    }
    return Result({"seconds": seconds, "readers": readers, "events_a_minute": EVENTS_A_MINUTE}, rows, figures)


def _until_seen(pages: list[Reader], runs: set[str]) -> None:
    give_up = time.monotonic() + 60
    while any(not runs <= set(page.seen) for page in pages):
        assert time.monotonic() < give_up, "a page never showed some run"
        time.sleep(0.05)


if __name__ == "__main__":
    main("console", run, doc=__doc__)
