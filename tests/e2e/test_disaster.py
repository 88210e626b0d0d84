"""Broker and store are lost in the middle of a run, with all that services kept: the platform goes on from a backup."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
from connito.client import Client

from tests.support.waiting import wait_until

from .test_detached import SMALL, Platform

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

THREE_CYCLES = tuple("3" if SMALL[at - 1] == "--cycles" else option for at, option in enumerate(SMALL))
# What an operator keeps elsewhere: who is who.
KEPT = {"keys", "accounts", "accounts.json", "roster.json"}


def facts_of(platform: Platform, run: str) -> dict[tuple[str, int], Any]:
    messages = platform.json("replay", run)["messages"]
    return {(message["stream"], message["sequence"]): message for message in messages}


def hold_in_the_middle(platform: Platform, run: str) -> None:
    """Behind its first version nothing goes on: who says what comes next is frozen, until it is lost with the rest."""
    coordinator = psutil.Process(json.loads((platform.data / "pids.json").read_text())["coordinator"]["pid"])
    with Client.local(platform.data) as client:
        assert any(status.version >= 1 for status in client.job.watch(run)), "the run ended without a version"
        coordinator.suspend()


def lose(platform: Platform) -> None:
    """As when the machine is gone: no process ends in order, and nothing is left but what was kept elsewhere."""
    pids = [row["pid"] for row in json.loads((platform.data / "pids.json").read_text()).values()]
    for pid in (json.loads((platform.data / "platform.json").read_text())["pid"], *pids):
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not platform.processes(), "what was killed to end")
    for path in platform.data.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_platform_goes_on_from_a_backup(tmp_path: Path) -> None:
    platform, backup = Platform(tmp_path / "data"), tmp_path / "backup"
    earlier = platform.json("up", *SMALL, "--domain", "logs")["run"]
    head = platform.json("audit", earlier, "--no-model")["chain"]["head"]
    run = platform.json("up", *THREE_CYCLES, "--no-wait")["run"]
    hold_in_the_middle(platform, run)
    saved = platform.json("backup", str(backup))
    before = facts_of(platform, run)
    assert (platform.data / "begun.json").exists(), "the run had ended before anything was lost"

    lose(platform)
    restored = platform.json("restore", str(backup))
    assert restored == saved
    kept = {place: fact for place, fact in before.items() if place[1] <= saved["streams"][place[0]]}
    assert ("MERGE", "version") in {(stream, fact["subject"].split(".")[-1]) for (stream, _), fact in kept.items()}
    assert facts_of(platform, run) == kept

    report = platform.json("up", *THREE_CYCLES)
    assert (report["run"], report["outcome"]["status"], report["totals"]["resumed"]) == (run, "completed", True)
    merged = [cycle["merged"] for cycle in report["cycles"]]
    # A window may have run out while nothing was there; the one before it and the one behind it did not.
    assert (len(merged), merged[0], merged[-1]) == (3, ["miner-1"], ["miner-1"])
    new = platform.json("up", *SMALL)["run"]
    audited = {
        one: platform.json("audit", one, *model)
        for one, model in ((earlier, ["--no-model"]), (run, []), (new, ["--no-model"]))
    }
    assert {one: found["result"] for one, found in audited.items()} == dict.fromkeys(audited, "same")
    assert audited[earlier]["chain"]["head"] == head
    experts = platform.json("library", "list")["experts"]
    assert {expert["run"] for expert in experts} == {earlier, run, new}
    for expert in experts:
        assert platform.json("library", "show", expert["expert_id"])["record"]
