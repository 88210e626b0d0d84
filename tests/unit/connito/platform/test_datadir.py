"""The folder that one `connito up` owns."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from connito.errors import Invalid, NotFound, Retry
from connito.platform.datadir import DataDir, Platform, start_time

HOLD = """
    import sys
    from pathlib import Path
    from connito.platform.datadir import DataDir
    with DataDir.open(Path(sys.argv[1])).lock():
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir.open(tmp_path / "platform")


def test_a_second_up_is_told_who_runs_and_how_to_stop_it(data: DataDir) -> None:
    script = [sys.executable, "-c", textwrap.dedent(HOLD), str(data.root)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert data.owner() == holder.pid
        with pytest.raises(Retry, match=f"process {holder.pid}.*connito down"), data.lock():
            pytest.fail("two held the folder")
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with data.lock():
        assert data.owner() == os.getpid()
    assert data.owner() is None


def test_the_environment_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONNITO_DATA_DIR", str(tmp_path / "here"))
    assert DataDir.open(None).root == tmp_path / "here"
    monkeypatch.delenv("CONNITO_DATA_DIR")
    monkeypatch.chdir(tmp_path)
    assert DataDir.open(None).root == tmp_path / ".connito"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Invalid, match=r"file/x.*--data-dir"):
        DataDir.open(tmp_path / "file" / "x")


def test_what_is_no_folder_is_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(Invalid, match=rf"{name}: it is a file, or a link to nowhere; .*--data-dir"):
            DataDir.open(tmp_path / name)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    for opened in (DataDir.open, DataDir.at):
        with pytest.raises(Invalid, match="the current folder is gone"):
            opened(Path("here"))


def test_a_platform_is_found_only_while_it_runs_and_only_by_its_owner(data: DataDir) -> None:
    with pytest.raises(NotFound, match="connito up"):
        data.running()
    platform = Platform(os.getpid(), "nats://127.0.0.1:1", "http://127.0.0.1:2", "key", "secret", run="r")
    data.write_platform(platform)
    assert stat.S_IMODE(data.platform_file.stat().st_mode) == 0o600
    with pytest.raises(NotFound):
        data.running()
    with data.lock():
        assert data.running() == platform


def test_leftovers_are_ended_and_strangers_with_the_same_number_are_not(data: DataDir) -> None:
    mine, stranger = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    started = start_time(mine.pid)
    assert started is not None
    data.write_pids(
        {
            "miner-1": {"pid": mine.pid, "module": "services.trainer", "restarts": 0, "started": started},
            "miner-2": {"pid": stranger.pid, "module": "services.trainer", "restarts": 0, "started": started - 1},
        }
    )
    assert data.end_leftovers() == ["miner-1"]
    assert mine.wait() == -signal.SIGKILL
    assert stranger.poll() is None
    stranger.communicate(b"\n")
    mine.communicate()
    assert data.end_leftovers() == []


def test_what_a_run_computed_with_is_what_an_audit_computes_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from connito.audit.runs import AuditOptions

    def as_the_run_had(threads: int | None, folder: Path | None, data_dir: Path | None) -> int:
        return AuditOptions(folder, data_dir, threads=threads).threads_of_run()

    monkeypatch.delenv("CONNITO_NATS_URL", raising=False)
    DataDir.open(tmp_path).keep_threads(1)
    assert as_the_run_had(None, tmp_path, None) == as_the_run_had(None, None, tmp_path) == 1
    assert as_the_run_had(3, tmp_path, None) == 3
    assert as_the_run_had(None, tmp_path / "elsewhere", None) == 0
    monkeypatch.setenv("CONNITO_NATS_URL", "nats://127.0.0.1:4222")
    monkeypatch.setenv("CONNITO_DATA_DIR", str(tmp_path))
    assert as_the_run_had(None, None, None) == 0


def test_what_is_printed_of_a_platform_holds_no_secret() -> None:
    assert "store-secret" not in repr(
        Platform(1, "nats://127.0.0.1:1", "http://127.0.0.1:2", "connito", "store-secret")
    )
