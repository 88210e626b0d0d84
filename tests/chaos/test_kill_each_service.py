"""SIGKILL for every process of a run, one after the other, in the middle of what it does: nothing is lost, nothing is
counted twice, and an audit with the model comes to the same bits. (Draws follow from the log: another run draws otherwise.)"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from connito.bus import CaughtUp
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid, NotFound
from connito.platform.datadir import DataDir
from connito.platform.session import Session
from connito.wire.log import Log

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]

OPTIONS = ["--base", "tiny", "--cycles", "3", "--miners", "2", "--validators", "2", "--seed", "11", "--json"]
UP_SECONDS = 280

# (section, cycle, kind) of the fact after which a process is killed: whoever has to act on it, while it does.
KILLS: dict[tuple[str, int, str], str] = {
    ("run", 0, "created"): "selector",
    ("train", 1, "opened"): "miner-1",
    ("commit", 1, "opened"): "committer",
    ("validate", 1, "opened"): "validator-1",
    ("validate", 1, "drawn"): "validator-2",
    ("merge", 1, "opened"): "aggregator",
    ("train", 2, "opened"): "coordinator",
    ("commit", 2, "opened"): "nats-server",
    ("submit", 2, "opened"): "miner-2",
    ("train", 3, "opened"): "weed",
    ("merge", 3, "version"): "library",
}


@dataclass
class Chaos:
    """Follows the run's log and kills by the table."""

    data: DataDir
    killed: list[str] = field(default_factory=list)

    async def run(self) -> None:
        session = await self._session()
        log = Log(session.roster)
        async with session.bus() as bus, aclosing(bus.follow(FACT_STREAMS)) as records:
            async for item in records:
                if isinstance(item, CaughtUp):
                    continue
                with suppress(Invalid):
                    fact = log.apply(item)
                    if fact is not None:
                        self._kill(KILLS.get((fact.key.section, fact.key.cycle, fact.key.kind)))

    async def _session(self) -> Session:
        """The platform, as soon as it is there."""
        while True:
            with suppress(NotFound):
                return Session.open(self.data.root, role="operator")
            await asyncio.sleep(0.02)

    def _kill(self, name: str | None) -> None:
        if name is not None and name not in self.killed:
            os.kill(self.data.read_pids()[name]["pid"], signal.SIGKILL)
            self.killed.append(name)


async def run(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """One `connito up` under fire: its report, and who was killed."""
    data = DataDir.open(folder)
    env = {name: value for name, value in os.environ.items() if name in ("CONNITO_CACHE_DIR",) or "CONNITO" not in name}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "connito.cli", "up", *OPTIONS, "--data-dir", str(folder),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
    )  # fmt: skip
    killer = Chaos(data)
    killing = asyncio.create_task(killer.run())
    try:
        async with asyncio.timeout(UP_SECONDS):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
            await process.communicate()
        killing.cancel()
        with suppress(asyncio.CancelledError):
            await killing
    assert process.returncode == 0, f"{err.decode()}\nkilled: {killer.killed}; logs in {folder}/logs"
    return json.loads(out), killer.killed


async def audited(run: str, folder: Path) -> None:
    """Everything follows from the log and the store, to the bit."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "connito.cli", "audit", run, "--from", str(folder), "--json",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(UP_SECONDS):
        out, err = await process.communicate()
    assert process.returncode == 0, out.decode() + err.decode()
    checks = [row for row in json.loads(out)["checks"] if row["check"] in ("losses", "merge")]
    assert checks
    assert all(row["note"].endswith("equal to the bit") for row in checks), checks


async def test_killing_every_process_once_loses_nothing(tmp_path: Path) -> None:
    report, killed = await run(tmp_path / "stormy")
    assert sorted(killed) == sorted(KILLS.values())
    assert report["totals"]["restarts"] == dict.fromkeys(killed, 1)
    judged = [
        {row["miner"]: row["status"] in ("merged", "scored", "rejected") for row in cycle["submissions"]}
        for cycle in report["cycles"]
    ]
    assert judged == [{"miner-1": True, "miner-2": True}] * 3
    assert report["library"]["expert_id"]
    # What the killed ones had there was removed by those who came after them.
    assert list(tmp_path.glob("stormy/cache*/scratch/*")) == []
    await audited(report["run"], tmp_path / "stormy")
