"""A service that is started again knows what it knew, wherever it was killed, and decides the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.errors import Invalid
from connito.runtime.host import HOST
from connito.service.keeping import Keeping
from connito.service.unbegun import Unbegun
from connito.wire import log as log_module
from connito.wire.fact import Record
from connito.wire.heads import LogTrees
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster

from services.committer.handlers import decide as committer_decides
from services.committer.settlement import due, settle
from services.committer.state import State as CommitterState
from services.coordinator.handlers import decide as coordinator_decides
from services.coordinator.state import State as CoordinatorState
from tests.unit.connito.audit.world import RUN, World, tell


class Stored:
    """A broker with a log."""

    host = HOST

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = {(record.stream, record.sequence): record for record in records}
        self.read = 0

    async def look(self, stream: str, seq: int) -> Record | None:
        return self.records.get((stream, seq))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


class Service:
    """What an engine does with each message, without its loop."""

    def __init__(self, make: Callable[[Roster], Log], world: World, stored: Stored, path: Path) -> None:
        self.log, self.stored = make(world.evidence().roster), stored
        self.keeping = Keeping(Kept(path, b"", b"secret"), self.log, cast(Bus, stored))

    async def start(self) -> dict[str, int]:
        start = await self.keeping.begin()
        self.unbegun = Unbegun(self.keeping.kept, self.log.runs)
        return start

    def take(self, record: Record) -> None:
        self.stored.read += 1
        for ready in self.unbegun.ready(record):
            try:
                fact = self.log.apply(ready)
            except Invalid:
                continue
            if fact is not None:
                if isinstance(self.log, CoordinatorState):
                    self.log.notice(fact, live=False)
                self.keeping.kept.put(fact)
        self.log.read(record)
        self.keeping.read(record)


def decisions(log: Log) -> Any:
    facts = log.runs[RUN]
    if isinstance(log, CommitterState):
        settled = [settle(facts, log.reveals[RUN], *window) for window in due(facts)]
        return committer_decides(facts, log.heard[RUN]), log.heard[RUN], settled
    if isinstance(log, CoordinatorState):
        return coordinator_decides(facts, 10**13, lambda key: 1.0), log.naming.of(RUN)
    return None


SERVICES: dict[str, Callable[[Roster], Log]] = {
    "committer": CommitterState,
    "coordinator": CoordinatorState,
    "validator": lambda roster: Log(roster, LogTrees()),
}


@pytest.mark.parametrize("every", [1, 7, 40])
@pytest.mark.parametrize("name", SERVICES)
async def test_killed_after_any_message_it_goes_on_as_if_nothing_had_happened(
    name: str, every: int, told: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is short: with one cycle at hand, it is on the disk for the most part."""
    monkeypatch.setattr(log_module, "CYCLES_AT_HAND", 1)
    records = told.records
    plain = Service(SERVICES[name], told, Stored(records), tmp_path / "plain")
    await plain.start()
    stored = Stored(records)
    service = Service(SERVICES[name], told, stored, tmp_path / "log")
    start = await service.start()
    assert start == {}
    for number, record in enumerate(records):
        plain.take(record)
        service.take(record)
        if number % every == 0:
            service.keeping.keep()
        if number % (every + 3) == 0:
            # What came since the last time is read again.
            service.keeping.kept.close()
            service = Service(SERVICES[name], told, stored, tmp_path / "log")
            start = await service.start()
            for again in records[: number + 1]:
                if again.sequence >= start.get(again.stream, 1):
                    service.take(again)
        if RUN in plain.log.runs:
            assert decisions(service.log) == decisions(plain.log)
    assert_same(service.log, plain.log)
    assert stored.read < 3 * len(records) * max(1, every // 2)
    service.keeping.kept.close()
    plain.keeping.kept.close()


def assert_same(log: Log, plain: Log) -> None:
    kept, full = log.runs[RUN], plain.runs[RUN]
    for fact in list(full.facts.values()):
        key = fact.key
        assert kept.fact(key.section, key.cycle, key.kind, key.id) == fact
    assert kept.cycle == full.cycle
    if plain.trees is not None and log.trees is not None:
        last = full.next_head - 1
        assert last >= 3
        assert log.trees.checkpoint(kept, last) == plain.trees.checkpoint(full, last)
        assert log.trees.of(RUN) == plain.trees.of(RUN)


async def test_another_log_is_read_from_its_start(told: World, tmp_path: Path) -> None:
    records = told.records
    service = Service(SERVICES["committer"], told, Stored(records), tmp_path / "log")
    await service.start()
    for record in records:
        service.take(record)
    service.keeping.keep()
    service.keeping.kept.close()
    moved = [Record(r.stream, r.sequence, r.subject, r.data, r.time_unix_ms + 1, r.headers) for r in records]
    for other in (moved, records[:10]):
        again = Service(SERVICES["committer"], told, Stored(other), tmp_path / "log")
        assert await again.start() == {}
        assert not again.log.runs
        again.keeping.kept.close()


async def test_what_cannot_be_read_here_is_read_again_by_the_next(told: World, tmp_path: Path) -> None:
    """An upgrade repairs a reader: what failed in it must not be passed over for good."""
    records = told.records
    service = Service(SERVICES["validator"], told, Stored(records), tmp_path / "log")
    await service.start()
    for record in records[:20]:
        service.take(record)
    service.keeping.keep()
    service.keeping.stop()
    for record in records[20:]:
        service.take(record)
    service.keeping.keep()
    service.keeping.kept.close()
    again = Service(SERVICES["validator"], told, Stored(records), tmp_path / "log")
    start = await again.start()
    assert sum(record.sequence >= start.get(record.stream, 1) for record in records) == len(records) - 20
    again.keeping.kept.close()
