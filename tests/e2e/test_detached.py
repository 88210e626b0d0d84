"""`up --no-wait`, every verb that looks at a running platform, `down`; and what a second `up` finds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.waiting import wait_until

from .conftest import environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SMALL = (
    "--base",
    "tiny",
    "--cycles",
    "1",
    "--miners",
    "1",
    "--validators",
    "1",
    "--set",
    "scoring.confidence=0.9",
    "--set",
    "training.local_steps=16",
)


class Platform:
    """Commands against one data directory."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def connito(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "connito.cli", *arguments, "--data-dir", str(self.data)]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=200)
        except subprocess.TimeoutExpired as error:
            logs = [
                f"== {path.name}\n{path.read_text()[-1500:]}" for path in sorted((self.data / "logs").glob("*.log"))
            ]
            raise AssertionError("\n".join([str(error), str(error.stderr), *logs])) from error

    def json(self, *arguments: str) -> Any:
        done = self.connito(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def processes(self) -> list[str]:
        lines = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
        return [line for line in lines if str(self.data) in line]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform that runs, and whose first run has ended."""
    platform = Platform(tmp_path_factory.mktemp("detached") / "data")
    started = platform.json("up", *SMALL, "--no-wait")
    try:
        assert started["data_dir"] == str(platform.data)
        watched = platform.json("job", "watch", started["run"])
        assert watched["phase"] == "completed"
        until_finished(platform)
        yield platform
    finally:
        platform.connito("down")
    assert platform.processes() == []


def until_finished(platform: Platform) -> None:
    """The report is written after the run has ended."""
    state = platform.data / "platform.json"
    wait_until(lambda: json.loads(state.read_text())["finished"], f"the report of the run; see {platform.data}/logs")


def run_of(platform: Platform) -> str:
    return str(platform.json("job", "list")["runs"][0]["run"])


def test_the_services_stay_up_and_are_listed(platform: Platform) -> None:
    status = platform.json("status")
    names = {service["name"] for service in status["services"]}
    assert {"coordinator", "committer", "aggregator", "selector", "library", "validator-1", "miner-1", "weed"} <= names
    assert all(psutil.pid_exists(service["pid"]) for service in status["services"])
    assert status["run"]["outcome"]["status"] == "completed"
    assert status["run"]["cycles"][0]["merged"] == ["miner-1"]
    assert "miner-1" in platform.connito("status").stdout


def test_the_run_and_its_expert_are_found(platform: Platform) -> None:
    run = run_of(platform)
    shown = platform.json("job", "show", run)
    assert (shown["phase"], shown["version"], shown["domain"]) == ("completed", 1, "recipes")
    experts = platform.json("library", "list")["experts"]
    assert [expert["run"] for expert in experts] == [run]
    record = platform.json("library", "show", experts[0]["expert_id"])["record"]
    assert record["domain"] == "recipes"
    card = platform.connito("library", "show", experts[0]["expert_id"]).stdout
    assert card.startswith("---\nlibrary_name: connito\n")
    assert f"\n# {experts[0]['expert_id']}" in card


def test_the_log_can_be_played_back(platform: Platform) -> None:
    replayed = platform.json("replay", run_of(platform))
    assert replayed["invalid"] == 0
    kinds = [message["subject"].split(".", 3)[-1] for message in replayed["messages"]]
    assert kinds[0] == "run.0.created"
    assert "merge.1.version" in kinds


def test_the_broker_is_declared_and_has_no_dead_letters(platform: Platform) -> None:
    streams = {stream["name"]: stream for stream in platform.json("streams", "ls")["streams"]}
    assert streams["RUNS"]["messages"] >= 4
    assert "RUNS" in platform.json("streams", "ensure")["ensured"]
    assert platform.json("dlq", "ls") == {"letters": []}
    assert platform.connito("dlq", "show", "1").returncode == 4


def test_doctor_tries_broker_and_store(platform: Platform) -> None:
    checks = {check["name"]: check["ok"] for check in platform.json("doctor")["checks"]}
    assert checks["broker"]
    assert checks["store rights"]


def test_a_miner_sees_what_became_of_its_work(platform: Platform) -> None:
    status = platform.json("miner", "status", "--key", str(platform.data / "keys" / "miner-1.nk"))
    assert [(row["cycle"], row["status"], row["rank"]) for row in status["cycles"]] == [(1, "merged", 1)]
    assert status["reward"] == status["cycles"][0]["reward"] > 0
    assert status["cycles"][0]["rating"]["judged"] == 1
    assert "±" in platform.connito("miner", "status", "--key", str(platform.data / "keys" / "miner-1.nk")).stdout


def test_the_ledger_of_a_run_adds_up(platform: Platform) -> None:
    ledger = platform.json("ledger", run_of(platform))
    assert ledger["conserved"]
    assert sum(entry["units"] for entry in ledger["entries"]) == ledger["emission"]
    assert {entry["role"] for entry in ledger["entries"]} == {"miner", "validator", "unallocated"}


def test_unknown_things_are_not_found(platform: Platform) -> None:
    for verb in (
        ("ledger", "none"),
        ("job", "show", "none"),
        ("job", "cancel", "none"),
        ("library", "show", "none"),
        ("replay", "none"),
    ):
        done = platform.connito(*verb)
        assert (verb, done.returncode) == (verb, 4)
        assert "Traceback" not in done.stderr


def test_a_second_up_is_refused_while_the_first_one_runs(platform: Platform) -> None:
    done = platform.connito("up", *SMALL)
    assert done.returncode == 5
    assert "connito down" in done.stderr


def archived_and_released(platform: Platform, run: str) -> None:
    """A run that has ended goes into one file, and out of the streams; everything else goes on."""
    file = platform.data.parent / "run.zip"
    live = platform.json("audit", run, "--no-model")
    sealed = platform.json("archive", run, str(file), "--release")
    assert platform.json("archive", run, str(file), "--release") == sealed, "safe to repeat"
    assert (sealed["head"], sealed["messages"]) == (live["chain"]["head"], live["messages"])
    gone = platform.connito("audit", run)
    assert (gone.returncode, sealed["sha256"] in gone.stderr) == (4, True), gone.stderr
    assert platform.connito("ledger", run).returncode == 4, "nobody was paid is no answer"

    def elsewhere(*options: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "connito.cli",
            "audit",
            run,
            "--from",
            str(file),
            "--no-model",
            "--json",
            *options,
        ]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment(), timeout=200)

    again = elsewhere("--data-dir", str(platform.data))
    assert again.returncode == 0, again.stdout + again.stderr
    document = json.loads(again.stdout)
    assert (document["result"], document["chain"]) == ("same", live["chain"])
    # Who has no key that may open the held-out text is told so, and nobody is blamed.
    closed = elsewhere("--data-dir", str(platform.data.parent / "nothing"))
    assert (closed.returncode, "no key here to open it" in closed.stderr) == (3, True), closed.stdout + closed.stderr
    assert run in {expert["run"] for expert in platform.json("library", "list")["experts"]}


def cleaned(platform: Platform, gone: str, kept: str) -> None:
    """What the archive took over goes from the store, and nothing else that anybody names."""
    would = platform.json("clean", "--older-than", "0")
    assert platform.json("clean")["stale"]["objects"] == 0, "all of it is young"
    done = platform.json("clean", "--older-than", "0", "--remove")
    assert (done["stale"], done["kept"]) == (would["stale"], would["kept"])
    assert platform.json("clean", "--older-than", "0")["stale"]["objects"] == 0
    objects = [path for path in (platform.data / "objects").rglob("*") if path.is_file()]
    assert objects
    assert 0 < done["stale"]["bytes"] < done["kept"]["bytes"]
    assert platform.json("audit", kept, "--no-model")["result"] == "same"
    for expert in platform.json("library", "list")["experts"]:
        assert platform.json("library", "show", expert["expert_id"])
    file = platform.data.parent / "run.zip"
    assert platform.connito("explain", f"{gone}/1/miner-1", "--from", str(file), "--no-model").returncode == 0


def test_another_up_in_the_same_folder_adds_to_the_library(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "data")
    first = platform.json("up", *SMALL)["run"]
    report = platform.json("up", *SMALL, "--domain", "logs")
    assert report["outcome"]["status"] == "completed"
    assert report["run"] != first
    third = platform.json("up", *SMALL, "--no-wait")["run"]
    deposited = {expert["run"] for expert in platform.json("library", "list")["experts"]}
    assert {first, report["run"]} <= deposited
    archived_and_released(platform, first)
    assert platform.json("job", "watch", third)["phase"] == "completed"
    cleaned(platform, first, third)
    assert platform.json("down")["stopped"]
    assert platform.processes() == []


@pytest.fixture
def broken_off(tmp_path: Path) -> Iterator[Platform]:
    """A platform whose `up` was interrupted while miners trained."""
    platform = Platform(tmp_path / "ünfinished data, $HOME")
    command = [sys.executable, "-m", "connito.cli", "up", *SMALL, "--data-dir", str(platform.data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as up:
        assert up.stdout is not None
        for line in up.stdout:
            if "miners train" in line:
                for _ in range(3):
                    up.send_signal(signal.SIGINT)
                break
        _, errors = up.communicate(timeout=120)
    assert up.returncode == 130
    assert "Traceback" not in errors
    assert platform.processes() == []
    yield platform
    platform.connito("down")
    assert platform.processes() == []


def test_the_next_up_goes_on_with_what_was_interrupted_and_killed(broken_off: Platform) -> None:
    """Interrupted, then killed with its preloaded process gone before, then stopped: one run, and one report."""
    platform = broken_off
    other = platform.connito("up", *SMALL, "--domain", "logs")
    assert other.returncode == 3
    assert "--domain logs, not none" in other.stderr
    assert "connito up --new" in other.stderr

    started = platform.json("up", "--no-wait")
    pids = json.loads((platform.data / "pids.json").read_text())
    psutil.Process(pids["fork server"]["pid"]).kill()
    psutil.Process(started["pid"]).kill()
    wait_until(lambda: not platform.processes(), "what the killed process ran to end")

    report = platform.json("up", *SMALL)
    assert (report["run"], report["outcome"]["status"], report["totals"]["resumed"]) == (
        started["run"],
        "completed",
        True,
    )
    assert [cycle["merged"] for cycle in report["cycles"]] == [["miner-1"]]
    assert json.loads((platform.data / "report.json").read_text()) == report

    after = platform.json("up", *SMALL, "--no-wait")
    assert after["run"] != report["run"]
    assert {row["run"] for row in platform.json("job", "list")["runs"]} == {after["run"], report["run"]}


def test_new_cancels_what_was_interrupted(broken_off: Platform) -> None:
    again = broken_off.connito("up", *SMALL, "--domain", "logs", "--new")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "which an earlier `connito up` left unfinished" in again.stdout
    assert json.loads((broken_off.data / "report.json").read_text())["domain"] == "logs"
