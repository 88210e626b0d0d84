"""Faults of the environment: what is one, how long to wait, and whom it is told."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from connito.errors import Environment, Invalid, ObjectDamaged, ObjectMissing, Retry, Unusable, VerificationFailed
from connito.runtime.waiting import LONGEST, Listener, Waiting, delay, here_and_now
from connito.v1 import reasons_pb2
from prometheus_client import REGISTRY


class OutOfMemoryError(RuntimeError):
    """As torch has it."""


@pytest.mark.parametrize(
    ("error", "dependency"),
    [
        (Retry("away", dependency="store"), "store"),
        (Retry("busy"), "peer"),
        (ObjectMissing("gone"), "object"),
        (ObjectDamaged("other bytes"), "object"),
        (Unusable("no", dependency="credentials", reason=reasons_pb2.REASON_NOT_PERMITTED), "credentials"),
        (MemoryError(), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
            "memory",
        ),
        *(
            (OSError(number, "no", "/cache/x"), "disk")
            for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO)
        ),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "machine"),
        (OSError(errno.EMFILE, "Too many open files"), "machine"),
    ],
)
def test_what_is_here_and_now_names_what_is_to_be_repaired(error: Exception, dependency: str) -> None:
    fault = here_and_now(error)
    assert isinstance(fault, Environment)
    assert fault.dependency == dependency
    assert str(fault)


def test_a_full_disk_below_a_database_is_a_fault_of_the_disk_and_a_wrong_statement_is_none(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "index", isolation_level=None)) as database:
        database.execute("create table t (x)")
        database.execute("pragma max_page_count = 2")
        with pytest.raises(sqlite3.OperationalError) as full:
            database.execute("insert into t values (zeroblob(100000))")
        with pytest.raises(sqlite3.OperationalError) as wrong:
            database.execute("insert into nothing values (1)")
    fault = here_and_now(full.value)
    assert fault is not None
    assert fault.dependency == "disk"
    assert here_and_now(wrong.value) is None


@pytest.mark.parametrize(
    "error",
    [Invalid("bad"), VerificationFailed("other"), ValueError("x"), RuntimeError("shape mismatch"), KeyError("k")],
)
def test_what_is_about_content_is_not(error: Exception) -> None:
    assert here_and_now(error) is None


def test_waits_grow_to_a_limit_and_are_never_all_equal() -> None:
    assert [delay(0.5, tries, lambda low, high: high) for tries in (0, 1, 2, 3, 4, 500)] == [
        0.5,
        1,
        2,
        4,
        LONGEST,
        LONGEST,
    ]
    assert delay(20.0, 0, lambda low, high: high) == 20.0, "who says when is believed, once"
    assert len({delay(1.0, 3) for _ in range(10)}) > 1
    assert all(0 < delay(1.0, tries) <= LONGEST for tries in range(20))


class Heard(Listener):
    """What it was told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def answered(self, dependency: str) -> None:
        self.heard.append(dependency)


def gauge(dependency: str, run: str) -> float | None:
    return REGISTRY.get_sample_value("connito_waiting", {"dependency": dependency, "run": run})


async def test_what_waits_is_a_gauge_by_dependency_and_run_until_it_waits_no_more() -> None:
    waiting, missing = Waiting(), ObjectMissing("gone")
    for what in ("a", "b", "a"):
        waiting.begin(what, missing, "w1", 1.0)
    assert gauge("object", "w1") == 2
    waiting.end("a")
    waiting.end("a")
    assert gauge("object", "w1") == 1
    waiting.begin("b", Retry("away", dependency="store"), "w1", 1.0)
    assert (gauge("object", "w1"), gauge("store", "w1")) == (None, 1)
    waiting.end("b")
    assert gauge("store", "w1") is None


async def test_what_nobody_asks_for_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("connito.runtime.waiting.FORGET_SECONDS", 0.01)
    waiting = Waiting()
    waiting.begin("a", Retry("away", dependency="store"), "w2", 0.0)
    async with asyncio.timeout(5):
        while gauge("store", "w2") is not None:  # noqa: ASYNC110 - a timer's doing
            await asyncio.sleep(0.005)


async def test_a_dependency_that_answers_is_told_to_who_waits_for_it_and_not_at_every_answer() -> None:
    waiting, heard = Waiting(), Heard()
    waiting.listen(heard)
    waiting.answered("store")
    assert heard.heard == [], "nothing waits"
    waiting.begin("a", Retry("away", dependency="store"), "w3", 1.0)
    waiting.answered("disk")
    for _ in range(100):
        waiting.answered("store")
    assert heard.heard == ["store"]
    waiting.end("a")
