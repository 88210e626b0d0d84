"""A file has its old content or its new one, wherever writing it is broken off, and the new one is on disk before it counts."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest
from connito.files import replacing, write_durably


class CutError(Exception):
    """The power is cut."""


class Disk:
    """Counts the steps that reach the disk, in order, and breaks off before the one that is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stop_before: int = 1000) -> None:
        self.steps: list[str] = []
        self._stop_before = stop_before
        fsync, replace = os.fsync, Path.replace

        def synced(descriptor: int) -> None:
            kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "content"
            self._step(kind)
            fsync(descriptor)

        def renamed(path: Path, target: Path) -> Path:
            self._step("name")
            return replace(path, target)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(Path, "replace", renamed)

    def _step(self, kind: str) -> None:
        if len(self.steps) == self._stop_before:
            raise CutError
        self.steps.append(kind)


def test_content_is_on_disk_before_its_name_and_its_name_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    write_durably(tmp_path / "file", "text")
    assert disk.steps == ["content", "name", "folder"]


@pytest.mark.parametrize("stop_before", range(3))
@pytest.mark.parametrize("before", [None, "old"])
def test_what_is_broken_off_leaves_one_content_or_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_before: int, before: str | None
) -> None:
    path = tmp_path / "file"
    if before is not None:
        path.write_text(before)
    Disk(monkeypatch, stop_before)
    with pytest.raises(CutError):
        write_durably(path, "new")
    assert (path.read_text() if path.exists() else None) == ("new" if stop_before == 2 else before)
    assert [left.name for left in tmp_path.iterdir() if left != path] == []


def test_an_error_while_writing_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def half() -> None:
        with replacing(tmp_path / "file") as draft:
            draft.write_text("half of the n")
            raise CutError

    with pytest.raises(CutError):
        half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (TimeoutError(), False),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), False),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), False),
        (OSError(errno.EHOSTUNREACH, "No route to host"), False),
        (OSError("cannot be read"), False),
    ],
)
def test_only_errors_of_the_file_system_name_the_file(error: OSError, named: bool, tmp_path: Path) -> None:
    with suppress(OSError), replacing(tmp_path / "file"):
        raise error
    assert error.filename == (str(tmp_path / "file") if named else None)


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    write_durably(tmp_path / "file", b"\x00secret", 0o600)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert (tmp_path / "file").read_bytes() == b"\x00secret"
