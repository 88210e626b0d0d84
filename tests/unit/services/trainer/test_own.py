"""What the committer says to a miner reaches it without anybody else's answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from connito.wire.fact import Record

from services.trainer.own import Own
from services.trainer.state import Ledger
from tests.support.run import ME, RUN, Run


class Bus:
    """A broker with answers by subject, and a clock."""

    def __init__(self) -> None:
        self.answers: dict[str, Record] = {}
        self.looked: list[str] = []
        self.now = 0.0
        self.host = SimpleNamespace(monotonic=lambda: self.now)

    async def hear(self, stream: str, subject: str, heard: Callable[[], None]) -> None:
        assert subject.rsplit(".", maxsplit=1)[-1] == ME, "nobody else's"

    async def look(self, stream: str, *, last_by_subj: str) -> Record | None:
        self.looked.append(last_by_subj)
        return self.answers.get(last_by_subj)


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    ledger = Ledger(tmp_path, ME)
    yield ledger
    ledger.close()


async def look(bus: Bus, story: Run, ledger: Ledger, own: Own | None = None) -> tuple[Own, list[Record]]:
    log: Any = SimpleNamespace(runs={RUN: story.facts})
    own = own or Own(bus, ME, log, ledger)  # type: ignore[arg-type]
    taken: list[Record] = []
    bus.looked.clear()
    following = asyncio.create_task(own.follow(taken.append, lambda run: None))
    for _ in range(30):
        await asyncio.sleep(0)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return own, taken


def place(window: str, kind: str, id_: str) -> str:
    return f"connito.v1.{RUN}.{window}.1.{kind}.{id_}"


async def test_what_was_said_before_the_start_is_looked_up_before_anything_is_decided(
    bus: Bus, story: Run, ledger: Ledger
) -> None:
    story.opened("train", 1).opened("commit", 1)
    accepted = bus.answers[place("commit", "accepted", ME)] = Record("COMMIT", 7, "", b"", 0)
    own = Own(bus, ME, SimpleNamespace(runs={}), ledger)  # type: ignore[arg-type]
    assert not own.knows(RUN)
    own, taken = await look(bus, story, ledger)
    assert own.knows(RUN)
    assert taken == [accepted]


async def test_a_miner_that_said_nothing_asks_for_nothing(bus: Bus, story: Run, ledger: Ledger) -> None:
    story.opened("train", 1).opened("commit", 1)
    own, _ = await look(bus, story, ledger)
    await look(bus, story, ledger, own)
    assert bus.looked == []


async def test_who_was_accepted_asks_for_no_refusals_and_who_was_not_asks_by_the_place_of_its_messages(
    bus: Bus, story: Run, ledger: Ledger
) -> None:
    story.opened("train", 1).opened("commit", 1)
    ledger.said(RUN, 1, 41, committed=True)
    own, _ = await look(bus, story, ledger)
    assert place("commit", "refused", f"{ME}-41") in bus.looked
    story.committed(ME, 1, b"d" * 32)
    await look(bus, story, ledger, own)
    assert bus.looked == []


async def test_of_a_settled_window_a_miner_soon_asks_no_more(bus: Bus, story: Run, ledger: Ledger) -> None:
    story.opened("train", 1).opened("commit", 1).closed("commit", 1).settled("commit", 1)
    ledger.said(RUN, 1, 41, committed=True)
    own, _ = await look(bus, story, ledger)
    assert place("commit", "refused", f"{ME}-41") in bus.looked
    bus.now = 60.0
    await look(bus, story, ledger, own)
    assert bus.looked == []


def test_where_messages_stand_outlives_their_receipts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, ME)
    ledger.said(RUN, 1, 41, committed=True)
    ledger.update(RUN, 1, unreceipted=())
    ledger.close()
    again = Ledger(tmp_path, ME)
    assert again.cycle(RUN, 1).places == (41,)
    again.close()
