"""After `connito up` has ended, with nothing running: the library, the report, the audit and the console still work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from .conftest import Finished, Up, environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ended(up: Up) -> Finished:
    done = up("--cycles", "1", "--miners", "1", "--validators", "1", "--seed", "3")
    assert done.code == 0, done.explain()
    return done


def connito(data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "connito.cli", *arguments, "--data-dir", str(data)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)


def answer(data: Path, *arguments: str) -> dict[str, Any]:
    done = connito(data, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_library_is_there_without_anything_running(ended: Finished, tmp_path: Path) -> None:
    expert = ended.report["library"]["expert_id"]
    assert [row["expert_id"] for row in answer(ended.data, "library", "list")["experts"]] == [expert]
    assert answer(ended.data, "library", "show", expert)["record"]["run"] == ended.report["run"]
    found = answer(ended.data, "library", "search", ended.report["domain"])["experts"]
    assert [row["expert_id"] for row in found] == [expert]
    answer(ended.data, "library", "export", expert, "--out", str(tmp_path / "expert"))
    assert (tmp_path / "expert" / "record.json").is_file()
    answer(ended.data, "library", "verify", expert)


def test_a_shelf_that_was_lost_is_filled_again_from_the_log(ended: Finished, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(ended.data, copy)
    shutil.rmtree(copy / "shelf")
    assert answer(copy, "library", "list")["experts"][0]["expert_id"] == ended.report["library"]["expert_id"]


def test_the_runs_are_shown_without_anything_running(ended: Finished) -> None:
    run = ended.report["run"]
    (row,) = answer(ended.data, "job", "list")["runs"]
    assert (row["run"], row["phase"], row["version"]) == (run, "completed", 1)
    assert answer(ended.data, "job", "show", run) == row
    assert connito(ended.data, "job", "show", "nothing").returncode == 4
    assert connito(ended.data, "job", "show", "").returncode == 4


def test_report_and_audit_read_the_folder(ended: Finished) -> None:
    run = ended.report["run"]
    report = answer(ended.data, "job", "report", run, "--no-measure")
    assert report["expert"]["expert_id"] == ended.report["library"]["expert_id"]
    assert 0 < report["coverage"]["read"] <= report["coverage"]["there"]
    assert answer(ended.data, "audit", run, "--no-model")["result"] == "same"
    assert connito(ended.data, "status").returncode == 4, "nothing was left running"


def test_the_console_serves_the_folder_and_ends_in_order(ended: Finished) -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "connito.cli",
        "console",
        "--port",
        "0",
        "--data-dir",
        str(ended.data),
        "--json",
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment() | {"PATH": os.environ["PATH"]}
    ) as console:
        assert console.stdout is not None
        address = re.search(r"http://[^\"]+", "".join(iter(console.stdout.readline, "}\n")))
        assert address is not None
        page = _page(f"{address[0]}runs/{ended.report['run']}")
        console.terminate()
        assert console.wait(30) in (0, -15, 143)
    assert ended.report["run"] in page


def _page(address: str, tries: int = 200) -> str:
    import time

    for _ in range(tries):
        try:
            with urllib.request.urlopen(address) as answered:
                return str(answered.read().decode())
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{address} does not answer")


def test_what_ends_with_the_run_names_commands_that_work(ended: Finished) -> None:
    from connito.local.defaults import UpOptions
    from connito.local.outcome import summary

    said = summary(ended.report, UpOptions(data_dir=ended.data))
    commands = [line.split("   ")[0].split() for line in said.splitlines() if line.startswith("  connito ")]
    assert len(commands) == 3
    for command in commands:
        if "export" not in command:
            assert connito(ended.data, *command[1 : command.index("--data-dir")]).returncode == 0, command
