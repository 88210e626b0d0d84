"""What the machine has no room for is done once there is room, and everything else ends at once."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from connito.errors import Invalid, Retry
from connito.files import write_durably
from connito.local import patience, tasks
from connito.local.patience import patiently
from connito.runtime.waiting import of_disk

from tests.support.waiting import PATIENCE


def failing(error: Exception, times: int) -> Callable[[], object]:
    left = [error] * times

    async def attempt() -> str:
        if left:
            raise left.pop()
        return "done"

    return attempt


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EIO, "Input/output error", "there"),
        Retry("no room", dependency="disk"),
        MemoryError(),
    ],
)
async def test_room_is_waited_for_and_said_once(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "AGAIN_SECONDS", 0.001)
    said: list[str] = []
    assert await patiently("this", failing(error, 5), said.append) == "done"  # type: ignore[arg-type]
    assert [line.startswith("this waits: ") for line in said] == [True]


@pytest.mark.parametrize("server", ["store", "broker"])
async def test_a_server_is_waited_for_where_it_is_started_again(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "AGAIN_SECONDS", 0.001)
    error = Retry("the server is away", dependency=server)
    said: list[str] = []
    assert await patiently("this", failing(error, 5), said.append, patience.SERVERS) == "done"  # type: ignore[arg-type]
    assert said == ["this waits: the server is away"]
    with pytest.raises(Retry):
        await patiently("this", failing(error, 1), said.append)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error", [Invalid("wrong"), Retry("away"), FileNotFoundError(2, "No such file"), KeyError("x")]
)
async def test_everything_else_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        await patiently("this", failing(error, 1), print)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
async def test_what_this_user_may_not_write_is_raised(number: int) -> None:
    bare = OSError(number, os.strerror(number), "there")
    worded = of_disk(bare, "a file")
    worded.__cause__ = bare
    for error in (bare, worded):
        with pytest.raises(type(error)) as raised:
            async with asyncio.timeout(PATIENCE):
                await patiently("this", failing(error, 1), print)  # type: ignore[arg-type]
        assert raised.value is error


def test_a_file_that_a_full_disk_does_not_take_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_durably(tmp_path / "note", "x")
    assert raised.value.filename == str(tmp_path / "note")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "dependency"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), Retry, "disk"),
        (Retry("away", dependency="store"), Retry, "store"),
        (Invalid("wrong"), Invalid, None),
    ],
)
def test_a_task_says_what_it_lacks(
    error: Exception,
    kind: type[Exception],
    dependency: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(params: object) -> dict[str, object]:
        raise error

    monkeypatch.setitem(tasks.TASKS, "proof", fail)
    tasks.main("proof", {})
    with pytest.raises(kind) as raised:
        tasks.read_lines(iter(capsys.readouterr().out.splitlines()), lambda what, share: None)
    assert getattr(raised.value, "dependency", None) == dependency


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_task_that_may_not_write_ends(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bare(params: object) -> dict[str, object]:
        raise OSError(number, os.strerror(number), "there")

    def worded(params: object) -> dict[str, object]:
        try:
            return bare(params)
        except OSError as error:
            raise of_disk(error, "a file") from error

    monkeypatch.setitem(tasks.TASKS, "proof", bare)
    with pytest.raises(OSError, match="there"):
        tasks.main("proof", {})
    monkeypatch.setitem(tasks.TASKS, "proof", worded)
    tasks.main("proof", {})
    with pytest.raises(Invalid, match="cannot write there"):
        tasks.read_lines(iter(capsys.readouterr().out.splitlines()), lambda what, share: None)
