"""What an ended run may give back: copies and handed-in work, never the base's own file or what is small."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from connito.local import footprint
from connito.local.supervisor import Supervisor
from connito.platform.datadir import DataDir

from tests.support.waiting import until


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataDir:
    monkeypatch.setattr(footprint, "LARGE_BYTES", 100)
    for cache in ("cache", "cache-miners"):
        for name, size in (("aa", 200), ("bb", 10), ("cc", 300)):
            entry = tmp_path / cache / "sha256" / name / (name * 32)
            entry.parent.mkdir(parents=True)
            entry.write_bytes(b"x" * size)
            entry.with_name(entry.name + ".ok").touch()
    base = tmp_path / "cache" / "sha256" / "cc" / ("cc" * 32)
    os.link(base, tmp_path / "base.safetensors")
    work = tmp_path / "miners" / "miner-1" / "run" / "3"
    work.mkdir(parents=True)
    (work / "artifact.safetensors").write_bytes(b"x" * 400)
    (work / "progress.json").write_bytes(b"x" * 400)
    return DataDir(tmp_path)


def test_copies_and_work_go_and_all_else_stays(data: DataDir) -> None:
    assert footprint.superfluous(data).bytes == 200 + 200 + 300 + 400
    room = footprint.tidy(data)
    assert {path.name[:2] for path in room.files} == {"aa", "cc", "ar"}
    assert (data.cache / "sha256" / "cc" / ("cc" * 32)).is_file(), "a second name of the base's file takes no room"
    assert (data.cache / "sha256" / "bb" / ("bb" * 32)).is_file()
    assert not list((data.cache / "sha256" / "aa").iterdir()), "the mark goes with its file"
    assert (data.root / "miners" / "miner-1" / "run" / "3" / "progress.json").is_file()
    assert footprint.superfluous(data).files == []


def test_an_empty_folder_has_nothing_to_give_back(tmp_path: Path) -> None:
    assert footprint.tidy(DataDir(tmp_path)).bytes == 0


def test_a_log_that_grows_for_ever_keeps_its_last_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "LOG_BYTES", 4000)
    (short := tmp_path / "short.log").write_bytes(b"x" * 4000)
    with (tmp_path / "long.log").open("ab") as log:
        for number in range(2000):
            log.write(b"line %d\n" % number)
            log.flush()
            footprint.trim(tmp_path)
    lines = (tmp_path / "long.log").read_bytes().splitlines()
    assert lines == [b"line %d" % number for number in range(2000 - len(lines), 2000)]
    assert 50 < len(lines) < 500
    assert short.stat().st_size == 4000


def test_lines_that_are_written_while_a_log_is_cut_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "LOG_BYTES", 4000)
    (log := tmp_path / "busy.log").write_bytes(b"".join(b"line %d\n" % number for number in range(500)))
    write, came = os.pwrite, list[bytes]()

    def busy(*given: Any) -> int:
        """Write, while the owner of the log writes as well."""
        if len(came) < 3:
            came.append(b"meanwhile %d\n" % len(came))
            with log.open("ab") as owner:
                owner.write(came[-1])
        return write(*given)

    monkeypatch.setattr("connito.local.footprint.os.pwrite", busy)
    footprint.trim(tmp_path)
    lines = log.read_bytes().splitlines(keepends=True)
    assert lines[-3:] == came
    assert lines[:-3] == [b"line %d\n" % number for number in range(503 - len(lines), 500)]


async def test_a_supervisor_trims_what_its_services_write(data: DataDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connito.local.supervisor._TRIM_EVERY", 0.01)
    monkeypatch.setattr(footprint, "LOG_BYTES", 4000)
    data.logs.mkdir()
    (log := data.logs / "miner-1.log").write_bytes(b"line\n" * 1000)
    supervisor = Supervisor(data, print)
    await until(lambda: log.stat().st_size <= 1000)
    await supervisor.stop()
