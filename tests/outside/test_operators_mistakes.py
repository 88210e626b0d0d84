"""Mistakes of operators, each made for real: one sentence with a remedy, the right exit code, and no traceback."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")}


def connito(
    *arguments: str, env: Mapping[str, str] = {}, before: Callable[[], None] | None = None, module: str = "connito.cli"
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**CLEAN, **env}, timeout=100, preexec_fn=before
    )


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What the command said last; it says so without a traceback."""
    everything = done.stdout + done.stderr
    assert "Traceback" not in everything, everything
    return everything.strip().splitlines()[-1]


def up(folder: Path, *options: str, before: Callable[[], None] | None = None) -> subprocess.CompletedProcess[str]:
    return connito("up", "--base", "tiny", *options, "--data-dir", str(folder), before=before)


def test_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = up(tmp_path / "file")
    assert (done.returncode, "cannot use the data directory" in said(done)) == (3, True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_data_directory_below_one_that_cannot_be_written() -> None:
    done = up(Path("/proc/connito"))
    assert (done.returncode, "/proc/connito" in said(done)) == (3, True)


@pytest.mark.parametrize(
    "content", ["", "{", '{"run": "x"}', '{"run": "x", "options": {"cycles": "many"}}', "\0" * 100]
)
def test_what_says_how_to_go_on_is_damaged_or_of_another_version(tmp_path: Path, content: str) -> None:
    (tmp_path / "begun.json").write_text(content)
    done = up(tmp_path)
    assert done.returncode == 3
    assert "connito up --new" in said(done)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("roster.json", "roster"), ("accounts.json", "accounts.json"), ("keys/miner-1.nk", "miner-1.nk")],
)
@pytest.mark.parametrize("content", ["", "{", "not what it was"])
def test_a_file_of_the_folder_is_damaged(tmp_path: Path, name: str, remedy: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    done = connito("status", "--data-dir", str(tmp_path))
    assert done.returncode == 4
    said(done)
    if name != "roster.json":  # which is written anew from the keys
        done = up(tmp_path)
        assert done.returncode == 3, done.stdout + done.stderr
        assert remedy in said(done)


@pytest.mark.parametrize("files", [12, 40, 200])
def test_too_few_open_files_are_allowed(tmp_path: Path, files: int) -> None:
    done = up(tmp_path, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)))
    assert done.returncode == 5
    assert "ulimit -n" in said(done)


def test_too_little_memory_is_allowed(tmp_path: Path) -> None:
    done = up(tmp_path, before=lambda: resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20)))
    assert done.returncode == 5
    assert "ulimit -v" in said(done)


@pytest.mark.parametrize("url", ["127.0.0.1:4222:x", "http://127.0.0.1:4222", "nats://", " , "])
def test_an_address_that_is_none(tmp_path: Path, url: str) -> None:
    from connito.wire.identity import Identity
    from connito.wire.roster import Roster

    Identity.generate().save(tmp_path / "key")
    Roster().save(tmp_path / "roster.json")
    given = {
        "CONNITO_NATS_URL": url,
        "CONNITO_KEY_FILE": str(tmp_path / "key"),
        "CONNITO_ROSTER": str(tmp_path / "roster.json"),
    }
    done = connito("status", env=given)
    assert (done.returncode, "CONNITO_NATS_URL" in said(done)) == (3, True)
    service = connito(env=given, module="services.selector")
    assert (service.returncode, "CONNITO_NATS_URL" in said(service)) == (1, True)


def test_a_run_that_is_no_name(tmp_path: Path) -> None:
    service = connito(env={"CONNITO_KEY_FILE": str(tmp_path / "key"), "CONNITO_RUN": "a b"}, module="services.selector")
    assert (service.returncode, "CONNITO_RUN" in said(service)) == (1, True)


@pytest.mark.parametrize("replicas", ["0", "-1", "6", "many"])
def test_copies_of_streams_that_cannot_be(replicas: str) -> None:
    done = connito("streams", "ensure", "--replicas", replicas)
    assert (done.returncode, "--replicas" in done.stderr) == (2, True)
    said(done)


@pytest.mark.parametrize("verb", ["status", "down", "streams ls", "dlq ls", "job list", "ledger none"])
def test_to_read_makes_no_folder(tmp_path: Path, verb: str) -> None:
    done = connito(*verb.split(), "--data-dir", str(tmp_path / "none" / "here"))
    assert done.returncode in (0, 4)
    said(done)
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_that_is_closed_ends_a_command_in_silence(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "connito.cli", "--help"]
    with os.fdopen(write_end, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, env=CLEAN)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_full_disk() -> None:
    """`/dev/full` takes nothing, as a full disk does."""
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "connito.cli", "--help"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=CLEAN)
    assert done.returncode == 5
    assert "No space left on device; free space on its disk" in done.stderr
    assert "Traceback" not in done.stderr


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system on `folder`; the test is skipped where nobody may mount one."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "connito-tests", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here, which root may where the system allows it")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    with mounted(tmp_path / "small ünd 小", "size=1m"):
        done = up(tmp_path / "small ünd 小")
    assert done.returncode == 5
    assert "are needed; free some, or choose another --data-dir" in said(done)


@pytest.mark.parametrize(
    ("verb", "code"), [("up --base tiny", 3), ("status", 4), ("job list", 4), ("down", 0), ("clean", 5)]
)
def test_a_data_directory_that_can_only_be_read(tmp_path: Path, verb: str, code: int) -> None:
    with mounted(tmp_path / "read only", "size=1m"):
        # As an `up` leaves it that was killed there.
        (tmp_path / "read only" / "lock").write_text("1\n")
        (tmp_path / "read only" / "pids.json").write_text("{}\n")
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "read only")], check=True)
        done = connito(*verb.split(), "--data-dir", str(tmp_path / "read only"))
    assert done.returncode == code, done.stdout + done.stderr
    said(done)


@pytest.mark.parametrize("verb", ["up --base tiny", "status", "down"])
def test_a_data_directory_of_another_user(tmp_path: Path, verb: str) -> None:
    """One sentence that names the folder and what to do, and not the form for a wrong option."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user")
    theirs = Path(tempfile.mkdtemp(prefix="connito-tests-"))
    try:
        other = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-m", "connito.cli"]
        done = subprocess.run(
            [*other, *verb.split(), "--data-dir", str(theirs)], capture_output=True, text=True, check=False, env=CLEAN
        )
    finally:
        theirs.rmdir()
    line = said(done)
    assert (done.returncode in (3, 5), str(theirs) in line) == (True, True), line
    assert "choose" in line or "become the user that it belongs to" in line


def test_a_service_that_may_write_nothing(tmp_path: Path) -> None:
    """What it cannot write is named in one sentence, and its end is one that passes: whoever starts it, starts it again."""
    from connito.wire.identity import Identity

    Identity.generate().save(tmp_path / "key")
    given = {"CONNITO_KEY_FILE": str(tmp_path / "key"), "CONNITO_PORT_FILE": str(tmp_path / "ports.json")}
    done = connito(
        env=given, module="services.library", before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    )
    assert done.returncode == 5
    assert "File too large; free space there" in said(done)


def test_lines_that_a_full_disk_does_not_take_are_lost_and_nothing_else() -> None:
    from connito.local.display import PlainDisplay
    from connito.runtime.logs import LineLogger

    full = Path("/dev/full").open("w", buffering=1)  # noqa: SIM115 - closing it fails, too
    LineLogger(full).error("lost")
    PlainDisplay(full).say("lost")
    with pytest.raises(OSError, match="No space left"):
        full.close()
