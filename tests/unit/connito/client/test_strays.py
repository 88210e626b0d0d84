"""What miners say of runs that do not exist can be dropped, and nothing else is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from connito.bus import Bus, streams
from connito.client import cleaning
from connito.wire import subjects
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster

MINER = Identity.generate().public
NOW, DAY = 1_000_000.0, 86400.0


def said(run: str, sequence: int, age_s: float) -> Record:
    return Record("INGRESS", sequence, subjects.ingress(run, MINER, "reveal"), b"x", int(1000 * (NOW - age_s)))


def created(run: str, sequence: int) -> Record:
    return Record("RUNS", sequence, subjects.fact(run, "run", 0, "created"), b"y", 5)


class Broker:
    """A log, and what was dropped of it."""

    def __init__(self, *records: Record) -> None:
        self.records, self.js = records, self
        self.purged: list[tuple[str, str]] = []

    async def stored(self, names: Sequence[str], run: str = "") -> AsyncIterator[Record]:
        for record in self.records:
            if record.stream in names:
                yield record

    async def time(self) -> float:
        return NOW

    async def purge_stream(self, name: str, *, subject: str) -> None:
        self.purged.append((name, subject))


LOG = (
    said("real", 1, 9 * DAY), created("real", 1), said("made-up", 2, 9 * DAY), said("busy", 3, 9 * DAY), said("busy", 4, 60),
    said("later", 5, 3 * DAY), created("later", 2),
)  # fmt: skip


async def test_a_stray_run_was_never_created_and_is_quiet() -> None:
    assert await cleaning.stray_runs(cast(Bus, Broker(*LOG)), DAY) == ["made-up"]
    assert await cleaning.stray_runs(cast(Bus, Broker(*LOG)), 0) == ["busy", "made-up"]


@pytest.mark.parametrize("remove", [False, True])
async def test_only_what_was_said_of_it_is_dropped_and_only_when_asked(remove: bool) -> None:
    broker = Broker(*LOG)

    class Empty:
        async def objects(self) -> list[Any]:
            return []

    done = await cleaning.collect(cast(Bus, broker), cast(Any, Empty()), Roster({}), remove=remove)
    assert done.strays == ["made-up"]
    wanted = [("INGRESS", streams.STREAMS["INGRESS"].filter("made-up"))] if remove else []
    assert broker.purged == wanted
