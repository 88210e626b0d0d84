"""What services wait for, read from their own pages."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from pathlib import Path

from connito.cli.status import _text
from connito.client.waiting import waiting, waits
from connito.errors import Retry
from connito.platform.datadir import DataDir
from connito.runtime.waiting import WAITING
from connito.service.probes import Probes


async def test_one_line_a_run_of_what_is_waited_for(tmp_path: Path) -> None:
    data, entries = DataDir(tmp_path), WAITING
    for one in entries.entries():  # A process has one page: services of other tests may have stopped while they waited.
        entries.end(one.what)
    names = ("committer", "validator-1", "gone")
    data.write_pids({name: {"pid": os.getpid(), "restarts": 0} for name in names})
    (tmp_path / "ports").mkdir()
    probes = Probes("127.0.0.1", 0, lambda: "")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for name, port in (("committer", probes.port), ("gone", free.getsockname()[1])):
            (tmp_path / "ports" / f"{name}.json").write_text(json.dumps({"http": port}))
    try:
        assert await asyncio.to_thread(waiting, data) == []
        for what, run, dependency in (
            ("a", "waits-1", "store"),
            ("b", "waits-1", "store"),
            ("c", "waits-1", "disk"),
            ("d", "", "broker"),
        ):
            entries.begin(what, Retry("away", dependency=dependency), run, 1.0)
        entries.give_up("waits-2/1/train", RuntimeError("mat1 and mat2\nmust have the same dtype"), "waits-2")
        rows = await asyncio.to_thread(waiting, data)
    finally:
        for what in ("a", "b", "c", "d", "waits-2/1/train"):
            entries.end(what)
        await probes.close()
    assert [(row["run"], row["dependency"], row["count"]) for row in rows] == [
        ("", "broker", 1), ("waits-1", "disk", 1), ("waits-1", "store", 2),
        ("waits-2", "repair", 1),
    ]  # fmt: skip
    lines = _text({"services": [], "waiting": rows, "security_events": {}, "run": None}).splitlines()
    assert "waits-1 waits for disk (1), store (2)" in lines
    assert "the platform waits for broker (1)" in lines
    assert "  committer: RuntimeError: mat1 and mat2 must have the same dtype" in lines


def test_one_that_takes_a_question_and_does_not_answer_is_named(tmp_path: Path) -> None:
    """As a stopped process, whose kernel goes on taking connections."""
    data = DataDir(tmp_path)
    data.write_pids({"aggregator": {"pid": os.getpid(), "restarts": 0}})
    (tmp_path / "ports").mkdir()
    with socket.socket() as stopped:
        stopped.bind(("127.0.0.1", 0))
        stopped.listen()
        (tmp_path / "ports" / "aggregator.json").write_text(json.dumps({"http": stopped.getsockname()[1]}))
        (found,) = waits(data)
    assert str(found).startswith("aggregator waits for process (answering): its process lives and does not answer")
    assert waits(data) == []
