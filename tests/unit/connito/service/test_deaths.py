"""Whether it was an action that ended the process before, and what is done about it."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from connito.bus import Bus
from connito.runtime.host import Host
from connito.runtime.waiting import WAITING
from connito.service.deaths import BY_ITSELF, FIRST_REST, LAST_REST, ROOM, UNEXPLAINED, Death, Deaths
from connito.service.engine import Action, Decision, Engine
from connito.wire.facts import RunFacts
from connito.wire.kept import Kept
from connito.wire.log import Log

from tests.support import waiting
from tests.unit.connito.service.test_pausing import BAD, GOOD, ROSTER, Broker, created

DEADLY = """
import os, signal, sys, ctypes
from pathlib import Path
from connito.service.deaths import Deaths
deaths = Deaths(Path(sys.argv[1]), Path(sys.argv[2]))
deaths.begin("r/1/train")
deaths.begin("r/1/told")
deaths.end("r/1/told")
if sys.argv[3] == "native":
    ctypes.string_at(0)
if sys.argv[3] == "memory":
    Path(sys.argv[2]).write_text("pgfault 7\\noom_kill 4\\n")
if sys.argv[3] == "orderly":
    deaths.forget()
    sys.exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    path = tmp_path / "vmstat"
    path.write_text("pgfault 7\noom_kill 3\n")
    return path


def die(path: Path, statistics: Path, how: str) -> int:
    return subprocess.run(
        [sys.executable, "-c", DEADLY, str(path), str(statistics), how], check=False, stderr=subprocess.DEVNULL
    ).returncode


@pytest.mark.parametrize(
    ("how", "code", "death"),
    [
        ("native", -signal.SIGSEGV, Death(1, 0, "Segmentation fault")),
        ("memory", -signal.SIGKILL, Death(1, 0, "the kernel was out of memory")),
        ("killed", -signal.SIGKILL, Death(0, 1)),
        ("orderly", 0, None),
    ],
)
def test_the_next_process_knows_what_the_one_before_died_of(
    how: str, code: int, death: Death | None, tmp_path: Path, statistics: Path
) -> None:
    path = tmp_path / "state" / "log-trainer.doing"
    assert die(path, statistics, how) == code
    after = Deaths(path, statistics)
    assert after.of("r/1/train") == death
    assert after.of("r/1/told") is None
    after.begin("r/1/train")
    after.end("r/1/train")
    assert Deaths(path, statistics).of("r/1/train") is None, "whoever gets through is no suspect"


def test_notes_that_nobody_holds_close_their_files(tmp_path: Path, statistics: Path) -> None:
    def held() -> list[str]:
        opened = Path("/proc/self/fd").iterdir()
        return [path for path in map(os.path.realpath, opened) if "notes" in path]

    deaths = Deaths(tmp_path / "notes.doing", statistics)
    assert len(held()) == 2
    del deaths
    gc.collect()
    assert held() == []
    faulthandler.disable()


def test_deaths_add_up_over_processes_and_a_crash_is_not_counted_twice(tmp_path: Path, statistics: Path) -> None:
    path = tmp_path / "log.doing"
    for _ in range(BY_ITSELF):
        die(path, statistics, "native")
    found = Deaths(path, statistics)
    assert found.of("r/1/train") == Death(BY_ITSELF, 0, "Segmentation fault")
    assert Deaths(path, statistics).of("r/1/train") == Death(BY_ITSELF, 0, "Segmentation fault")


def test_only_what_did_it_itself_is_set_aside_and_other_deaths_give_a_rest() -> None:
    assert not Death(BY_ITSELF - 1, 100, "x").set_aside
    assert "2 times (Segmentation fault)" in Death(BY_ITSELF, 0, "Segmentation fault").set_aside
    rests = [Death(0, UNEXPLAINED + more).rest for more in (-1, 0, 1, 2, 1000)]
    assert rests == [0.0, FIRST_REST, 2 * FIRST_REST, 4 * FIRST_REST, LAST_REST]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"deaths": {"a": {"x": 1}}, "under_way": {}}', b"\xff\xfe", b"null"]
)
def test_a_damaged_note_is_no_note(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log.doing"
    path.write_bytes(content)
    assert Deaths(path).of("a") is None
    assert json.loads(path.read_text()) == {"under_way": {}, "deaths": {}}


def test_without_a_folder_nothing_is_noted() -> None:
    noted = Deaths(None)
    noted.begin("a")
    noted.end("a")
    noted.forget()
    assert noted.of("a") is None


@pytest.fixture
def clear() -> Iterator[None]:
    for one in WAITING.entries():
        WAITING.end(one.what)
    yield
    for one in WAITING.entries():
        WAITING.end(one.what)


def engine_after(path: Path, found: dict[str, Death], done: list[str], bus: Broker, now: list[int]) -> Engine:
    """An engine whose process comes after ones that ended in some actions of two runs."""
    rows = {action: vars(death) for action, death in found.items()}
    path.with_suffix(".doing").write_text(json.dumps({"under_way": {}, "deaths": rows}))
    active: list[str] = []

    async def perform(action: Action) -> None:
        active.append(action.key)
        assert active == [action.key] or not any(key in found for key in active), "a suspect has company"
        await asyncio.sleep(0)
        active.remove(action.key)
        done.append(action.key)

    def decide(facts: RunFacts, _now_ms: int) -> Decision:
        keys = [f"{facts.run}/merge", f"{facts.run}/other"]
        return Decision([Action(key, facts.run, key) for key in keys if key not in done])

    bus.host = Host(monotonic=lambda: now[0] / 1000)
    return Engine(
        cast(Bus, bus),
        Log(ROSTER),
        ("RUNS",),
        decide,
        perform,
        service="aggregator",
        kept=Kept(path),
    )


@pytest.mark.usefixtures("clear")
async def test_an_action_that_ended_its_process_twice_is_set_aside_by_name_and_all_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connito.service.engine.SETTLE_MS", 1)
    bus, done, now = Broker([created(BAD, 1), created(GOOD, 2)]), list[str](), [0]
    suspects = {f"{BAD}/merge": Death(BY_ITSELF, 0, "Segmentation fault"), f"{GOOD}/merge": Death(1, 0, "Aborted")}
    running = asyncio.create_task(engine_after(tmp_path / "log.sqlite", suspects, done, bus, now).run())
    await waiting.until(lambda: len(done) == 3 and bool(bus.written), seconds=20.0)
    running.cancel()
    assert sorted(done) == [f"{BAD}/other", f"{GOOD}/merge", f"{GOOD}/other"]
    ((*_, notice),) = bus.written
    assert (notice.run, notice.service, notice.action) == (BAD, "aggregator", f"{BAD}/merge")
    assert notice.detail == "it ended its process 2 times (Segmentation fault)"
    assert [(one.what, one.given_up) for one in WAITING.entries()] == [(f"{BAD}/merge", True)]


@pytest.mark.usefixtures("clear")
async def test_an_action_in_which_processes_end_for_no_known_reason_is_left_alone_for_a_while(tmp_path: Path) -> None:
    bus, done, now = Broker([created(BAD, 1)]), list[str](), [0]
    suspects = {f"{BAD}/merge": Death(0, UNEXPLAINED)}
    engine = engine_after(tmp_path / "log.sqlite", suspects, done, bus, now)
    running = asyncio.create_task(engine.run())
    await waiting.until(lambda: f"{BAD}/other" in done, seconds=20.0)
    now[0] = int(FIRST_REST * 1000) - 1
    engine.wake()
    await asyncio.sleep(0.05)
    assert f"{BAD}/merge" not in done
    assert [(one.what, one.given_up) for one in WAITING.entries()] == [(f"{BAD}/merge", False)]
    now[0] += 1
    engine.wake()
    await waiting.until(lambda: f"{BAD}/merge" in done, seconds=20.0)
    running.cancel()
    assert not bus.written
    assert not WAITING.entries()


def test_notes_need_no_further_room_while_actions_come_and_go(tmp_path: Path, statistics: Path) -> None:
    """What no longer fits on a full disk would be torn, and so nothing to whoever reads it."""
    deaths = Deaths(path := tmp_path / "log.doing", statistics)
    sizes = {path.stat().st_size}
    for number in range(40):
        deaths.begin(f"r/{number}/train")
        sizes.add(path.stat().st_size)
        assert f"r/{number}/train" in json.loads(path.read_text())["under_way"]
    for number in range(40):
        deaths.end(f"r/{number}/train")
    assert sizes == {path.stat().st_size} == {ROOM}
    deaths.forget()
