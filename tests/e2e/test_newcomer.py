"""A miner's path: one line with an invite, from nothing to the first merged reward, against a running platform.

Everything a newcomer sees is kept: `pytest -s` prints it with the seconds since that line.
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
    """A folder with a key in it, or none yet. Nobody set a variable for it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.log = folder, folder / "miner.log"
        private = {"CONNITO_WORK_DIR": str(folder / "work"), "CONNITO_CACHE_DIR": str(folder / "cache")}
        self.env = environment() | private

    def connito(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        command = [sys.executable, "-m", "connito.cli", *arguments, "--json"]
        env = self.env | {"CONNITO_KEY_FILE": "miner.nk"}
        done = subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == code, (done.stdout, done.stderr)
        return dict(json.loads(done.stdout)) if done.stdout else {}

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "connito.cli", "miner", "run", "--label", "newcomer", "--json", *arguments]
        with self.log.open("wb") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=subprocess.DEVNULL, stderr=log)

    def events(self) -> list[dict[str, Any]]:
        """What its trainer logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def invited(data: Path) -> str:
    """What the operator does: sign an invite, with nothing to be told to the broker."""
    command = [sys.executable, "-m", "connito.cli", "invite", "--data-dir", str(data), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=60)
    return str(json.loads(done.stdout)["token"])


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


def test_from_nothing_to_a_merged_reward(platform: Path, tmp_path: Path) -> None:
    bus = json.loads((platform / "platform.json").read_text())["nats_url"]
    stranger = Newcomer(tmp_path / "stranger")
    made = stranger.connito("miner", "init")
    refused = stranger.start("--bus", bus, "--roster", str(platform / "roster.json"))
    assert refused.wait(120) != 0
    said = stranger.log.read_text()
    assert f"refuses {made['public_key']}; the operator has to admit that key" in said

    newcomer, token = Newcomer(tmp_path / "newcomer"), invited(platform)
    began, zero = time.monotonic(), time.time()
    miner = newcomer.start("--invite", token)
    try:
        rows: list[dict[str, Any]] = []
        while not any(row["status"] == "merged" for row in rows):
            assert miner.poll() is None, newcomer.log.read_text()
            assert time.monotonic() - began < 240, f"{rows}\n{newcomer.log.read_text()[-4000:]}"
            if "reveal accepted" not in newcomer.log.read_text():
                time.sleep(0.2)
                continue
            rows = newcomer.connito("miner", "status")["cycles"]
        seconds = time.monotonic() - began
        best = next(row for row in rows if row["status"] == "merged")
        told_to_a_miner(newcomer, best)
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
    assert (best["miner"], best["reward"] > 0) == ("newcomer", True)
    print(f"\n{said.strip().splitlines()[-1]}")
    for event in events[: story.index("reveal accepted") + 3]:
        since = _unix(event["timestamp"]) - zero
        print(
            f"[{since:5.1f} s] {event['event']}",
            *(f"{k}={event[k]}" for k in ("cycle", "steps", "bytes") if k in event),
        )
    print(f"merged after {seconds:.1f} s; reward {best['reward']} in cycle {best['cycle']}")


def told_to_a_miner(newcomer: Newcomer, best: dict[str, Any]) -> None:
    """With the miner's own key, and no key of the store."""
    top = newcomer.connito("miner", "top")
    own = next(place for place in top["places"] if place["miner"] == top["miner"])
    assert (own["label"], own["earned"][best["run"]] >= best["reward"]) == ("newcomer", True)
    ledger = newcomer.connito("ledger", best["run"], "--account", "newcomer")
    assert best["reward"] in [entry["units"] for entry in ledger["entries"]]
    explained = newcomer.connito("explain", f"{best['run']}/{best['cycle']}/newcomer")
    assert (explained["result"], explained["verdict"]["reward"]) == ("same", best["reward"])
    checks = {check["name"]: check for check in newcomer.connito("doctor")["checks"]}
    assert "enrolled" in checks[f"run {best['run']}"]["found"]
    assert "down" in checks["bandwidth"]["found"]
    assert "training needs" in checks[f"fit of {best['run']}"]["found"]
    assert "units for a submission" in checks[f"reward of {best['run']}"]["found"]


def _unix(timestamp: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(timestamp).timestamp()
