"""A run that keeps the artifacts of its last cycles only: older ones go from the store, and an audit says which."""

from __future__ import annotations

from pathlib import Path

import pytest

from .test_detached import SMALL, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CYCLES, KEPT = 5, 2
OPTIONS = [option for option in SMALL if option != "training.local_steps=16"][:-1]


def test_old_cycles_go_and_the_rest_still_audits(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "data")
    settings = (f"retention.cycles={KEPT}", "training.local_steps=4", "windows.floor_seconds=1")
    options = [part for setting in settings for part in ("--set", setting)]
    run = platform.json("up", *OPTIONS, "--cycles", str(CYCLES), *options, "--no-wait")["run"]
    try:
        assert platform.json("job", "watch", run)["phase"] == "completed"
        before = platform.json("audit", run, "--no-model")
        done = platform.json("clean", "--remove")
        # Hand-in, state and outer state of each cycle before the one that the first kept cycle began from.
        assert done["stale"]["objects"] >= 2 * (CYCLES - KEPT - 1), done
        after = platform.json("audit", run, "--no-model")
        # The last head and who cosigned it may come while the first audit runs: they are of the run, after its end.
        was, now = ({**audit["chain"]["windows"], "run": ""} for audit in (before, after))
        assert (after["result"], now) == ("same", was)
        notes = {row["check"]: row["note"] for row in after["checks"]}
        assert f"cycles before {CYCLES - KEPT + 1} are not kept" in notes["retention"]
        old = platform.connito("explain", f"{run}/1/miner-1", "--no-model")
        assert (old.returncode, "keeps the artifacts of cycles from" in old.stderr) == (3, True), old.stderr
        assert platform.connito("explain", f"{run}/{CYCLES}/miner-1", "--no-model").returncode == 0
        sealed = platform.json("archive", run, str(tmp_path / "run.zip"))
        assert sealed["head"] == after["chain"]["head"]
        assert platform.json("clean", "--older-than", "0")["stale"]["objects"] == 0
    finally:
        platform.connito("down")
