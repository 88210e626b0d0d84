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
from connito import Client
from connito.errors import NotFound

from tests.unit.connito.cli.conftest import Call, call
from tests.unit.connito.cli.test_surface import every_verb

from .conftest import Finished, Up, environment

__all__ = ["call"]

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


# Every verb that reads a platform, with what it is asked for. The rest of the command line starts, changes or needs none.
READS = {
    "library list": (),
    "library show": ("EXPERT",),
    "library search": ("DOMAIN",),
    "library demand": (),
    "library ledger": ("EXPERT",),
    "library verify": ("EXPERT",),
    "library export": ("EXPERT", "--out", "OUT/expert"),
    "job list": (),
    "job show": ("RUN",),
    "job watch": ("RUN",),
    "job report": ("RUN", "--no-measure"),
    "audit": ("RUN", "--no-model"),
    "explain": ("RUN/1/miner-1", "--no-model"),
    "replay": ("RUN",),
    "ledger": ("RUN",),
    "miner top": (),
    "miner status": ("--public-key", "KEY"),
    "payouts export": ("RUN", "OUT/paid.csv"),
    "dlq ls": (),
    "streams ls": (),
    "advisories": (),
    "archive": ("RUN", "OUT/run.zip"),
}
OTHERS = {
    # Start, stop or change a platform, or take part in one.
    "up",
    "backup",
    "restore",
    "down",
    "miner join",
    "ban",
    "invite",
    "clean",
    "streams ensure",
    "dlq retry",
    "job submit",
    "job cancel",
    "miner init",
    "miner run",
    "library mark",
    "library deposit",
    "library push",
    "library pull",
    "base import",
    "console",
    "serve",
    "status",
    "doctor",
    "dlq show",
    "job check",
    "job quote",
    "select",
    "evaluate",
    "witness",
    "payouts verify",
    "payouts bind",
    "payouts weights",
}
LOCAL = ("access ", "base ", "library ", "miner fits")


@pytest.mark.parametrize("verb", READS)
def test_every_verb_that_reads_works_at_rest(ended: Finished, call: Call, tmp_path: Path, verb: str) -> None:
    report = ended.report
    given = {
        "EXPERT": report["library"]["expert_id"], "RUN": report["run"], "DOMAIN": report["domain"],
        "KEY": ended.row(1, "miner-1")["key"],
    }  # fmt: skip
    arguments = [argument.replace("OUT", str(tmp_path)) for argument in READS[verb]]
    for name, value in given.items():
        arguments = [argument.replace(name, value) for argument in arguments]
    done = call(*verb.split(), *arguments, "--data-dir", ended.data, "--json")
    assert done.code == 0, f"{verb}: {done.out}{done.err}"
    assert json.loads(done.out)


def test_no_verb_is_forgotten() -> None:
    forgotten = {verb for verb in every_verb() if not verb.startswith(LOCAL)} - READS.keys() - OTHERS
    assert not forgotten, "does it read a platform at rest, too?"


def test_python_reads_what_the_commands_read(ended: Finished) -> None:
    """In a running loop, as every cell of a notebook is."""
    import asyncio

    async def cell() -> None:
        with Client.local(ended.data) as client:
            expert = ended.report["library"]["expert_id"]
            assert [status.spec.run for status in client.job.list()] == [ended.report["run"]]
            assert client.job.show(ended.report["run"]).version == 1
            assert [status.spec.run for status in client.job.watch(ended.report["run"])] == [ended.report["run"]]
            assert client.job.report(ended.report["run"], measure=False)["expert"]["expert_id"] == expert
            assert [summary.expert_id for summary in client.library.list()] == [expert]
            assert [hit.expert_id for hit in client.library.search(ended.report["domain"])] == [expert]
            summary, record = client.library.show(expert)
            assert summary.expert.digest == record["expert"]["digest"]
            assert json.loads(client.library.attestation(expert))
            assert client.library.standing(expert).status == "good"
            assert client.library.ledger(expert)["uncredited"] == 0
            with pytest.raises(NotFound, match="connito up"):
                client.job.cancel(ended.report["run"])
            with pytest.raises(NotFound, match="connito up"):
                client.library.mark(expert, "yanked", "a try")

    asyncio.run(cell())


def test_many_may_read_a_folder_at_once(ended: Finished) -> None:
    command = [sys.executable, "-P", "-m", "connito.cli", "job", "list", "--json", "--data-dir", str(ended.data)]
    readers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        for _ in range(3)
    ]
    said = [reader.communicate(timeout=120) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0], said
    assert {json.loads(out)["runs"][0]["run"] for out, _ in said} == {ended.report["run"]}
    assert not list(ended.data.glob(".reader-*")), "a reader leaves nothing behind"
