"""What `up --no-wait` shows of the process that it leaves: its lines as they are."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from connito.local.display import choose_display
from connito.local.up import _wait_until_ready
from connito.platform.datadir import DataDir, Platform


def test_a_line_of_the_log_has_its_own_time_of_day_and_no_second_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, written, shown = DataDir.open(tmp_path), io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    with choose_display(as_json=False) as display:
        display.say("cycle 1 · train: miners train")
        display.say("cycle 1 · commit: miners commit")
    (data.logs / "up.log").write_text(written.getvalue())
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        data.write_platform(Platform(child.pid, "nats://here", "http://here", "key", "secret", "r", ready=True))
        monkeypatch.setattr(sys, "stdout", shown)
        _wait_until_ready(data, child, shown)
    finally:
        child.communicate(b"\n")
    assert written.getvalue().count("[") == 2, "each line says when"
    assert shown.getvalue() == written.getvalue()


def test_what_was_said_just_before_it_was_ready_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, shown = DataDir.open(tmp_path), io.StringIO()
    log = data.logs / "up.log"
    log.write_text("first\n")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ready = Platform(child.pid, "nats://here", "http://here", "key", "secret", "r", ready=True)

    def as_it_gets_ready(_: DataDir) -> Platform:
        with log.open("a") as file:
            file.write("last\n")
        return ready

    monkeypatch.setattr(DataDir, "read_platform", as_it_gets_ready)
    try:
        _wait_until_ready(data, child, shown)
    finally:
        child.communicate(b"\n")
    assert shown.getvalue() == "first\nlast\n"
