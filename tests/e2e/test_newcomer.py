"""A miner's path: from nothing to the first accepted submission, with the trainer alone against a running platform.

Everything a newcomer sees is kept: `pytest -s` prints it with the seconds since `miner init`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import wait_until

from .conftest import environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


# What one action logs comes in order. Actions run side by side: what one of them is begun for is told before, but what
# it sets in motion elsewhere may come back and be told before its own last line.
ACTIONS = (
    ("model loaded", "trained", "result kept"),
    ("committed",),
    ("uploaded", "revealed"),
    ("commitment accepted",),
    ("reveal accepted",),
)
AFTER = (
    ("result kept", "committed"),
    ("result kept", "commitment accepted"),
    ("result kept", "uploaded"),
    ("uploaded", "reveal accepted"),
)


class Newcomer:
    """A folder with a key in it, and what the operator told: the bus and the roster."""

    def __init__(self, folder: Path, bus: str, roster: Path) -> None:
        self.folder, self.log = folder, folder / "miner.log"
        private = {"CONNITO_WORK_DIR": str(folder / "work"), "CONNITO_CACHE_DIR": str(folder / "cache")}
        self.env = environment() | private | {"CONNITO_NATS_URL": bus, "CONNITO_ROSTER": str(roster)}

    def connito(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "connito.cli", "miner", *arguments, "--key", "miner.nk", "--json"]
        return subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False, timeout=120
        )

    def start(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "connito.cli",
            "miner",
            "run",
            "--key",
            "miner.nk",
            "--label",
            "newcomer",
            "--json",
        ]
        with self.log.open("wb") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=subprocess.DEVNULL, stderr=log)

    def events(self) -> list[dict[str, Any]]:
        """What its trainer logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def admit(data: Path, key: str) -> str:
    """What the operator does: sign a pass, with nothing to be told to the broker."""
    command = [sys.executable, "-m", "connito.cli", "access", "add", str(data), key, "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=60)
    return str(json.loads(done.stdout)["passes"][key])


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Path]:
    data = tmp_path / "platform"
    connito = [sys.executable, "-m", "connito.cli"]
    up = ["up", "--base", "tiny", "--cycles", "500", "--miners", "1", "--validators", "1", "--no-wait", "--json"]
    # Merges that hardly move the model leave the newcomer, who needs some cycles to get ready, something to improve.
    chosen = ["--set", "merging.outer_learning_rate=0.001", "--set", "merging.outer_momentum=0"]
    chosen += ["--set", "training.local_steps=16", "--data-dir", str(data)]
    started = subprocess.run(
        [*connito, *up, *chosen], env=environment(), capture_output=True, text=True, check=False, timeout=200
    )
    assert started.returncode == 0, started.stderr
    yield data
    subprocess.run([*connito, "down", "--data-dir", str(data)], env=environment(), check=False, capture_output=True)


def test_from_nothing_to_an_accepted_submission(platform: Path, tmp_path: Path) -> None:
    bus = json.loads((platform / "platform.json").read_text())["nats_url"]
    (tmp_path / "newcomer").mkdir()
    newcomer = Newcomer(tmp_path / "newcomer", bus, platform / "roster.json")
    began, zero = time.monotonic(), time.time()

    made = json.loads(newcomer.connito("init").stdout)
    refused = newcomer.start()
    assert refused.wait(120) != 0
    said = newcomer.log.read_text()
    assert f"refuses {made['public_key']}; the operator has to admit that key" in said

    told = time.monotonic()
    joined = newcomer.connito("join", admit(platform, made["public_key"]))
    assert joined.returncode == 0, joined.stderr
    assert time.monotonic() - told < 5.0, "a key is admitted in seconds"
    miner = newcomer.start()
    try:
        rows: list[dict[str, Any]] = []
        while not any(row["status"] in ("scored", "merged") for row in rows):
            assert miner.poll() is None, newcomer.log.read_text()
            assert time.monotonic() - began < 240, f"{rows}\n{newcomer.log.read_text()[-4000:]}"
            status = newcomer.connito("status")
            assert status.returncode == 0, status.stderr
            rows = json.loads(status.stdout)["cycles"]
        seconds = time.monotonic() - began
        wait_until(lambda: "reveal accepted" in newcomer.log.read_text(), "the miner to tell of its reveal")
    finally:
        miner.terminate()
        stopped = miner.wait(60)
    assert stopped == 0
    events = newcomer.events()
    story = [event["event"] for event in events]
    assert "enrolled" in story
    for action in ACTIONS:
        places = [story.index(step) for step in action]
        assert places == sorted(places), story
    for before, after in AFTER:
        assert story.index(before) < story.index(after), story
    # With the miner's own key.
    best = next(row for row in rows if row["status"] in ("scored", "merged"))
    assert (best["miner"], best["reward"] > 0) == ("newcomer", True)
    print(f"\n{said.strip().splitlines()[-1]}")
    for event in events[: story.index("reveal accepted") + 3]:
        since = _unix(event["timestamp"]) - zero
        print(
            f"[{since:5.1f} s] {event['event']}",
            *(f"{k}={event[k]}" for k in ("cycle", "steps", "bytes") if k in event),
        )
    print(f"accepted after {seconds:.1f} s; reward {best['reward']} in cycle {best['cycle']}")


def _unix(timestamp: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(timestamp).timestamp()
