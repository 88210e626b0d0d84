"""What a depositor refuses before it reads any artifact."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.errors import Invalid
from connito.protocol.findings import PROTOCOL_VERSION
from connito.store import ArtifactStore
from connito.v1 import run_pb2
from connito.wire import subjects
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from services.library.actions import Depositor

LIBRARY = Identity.generate(b"library".ljust(32))
COORDINATOR = Identity.generate(b"coordinator".ljust(32))


def record(sequence: int, kind: str, message: run_pb2.RunCreated | run_pb2.RunEnded) -> Record:
    subject = subjects.fact("r", "run", 0, kind)
    return Record("RUNS", sequence, subject, seal(COORDINATOR, subject, message).SerializeToString(), 0)


class Stored:
    """A broker that holds these records."""

    def __init__(self, *records: Record) -> None:
        self.records, self.identity = records, LIBRARY
        self.written: list[tuple[str, str, run_pb2.RunPaused]] = []

    async def publish_fact(
        self, run: str, section: str, cycle: int, kind: str, message: run_pb2.RunPaused, id_: str
    ) -> bool:
        assert (section, cycle, id_) == ("run", 0, LIBRARY.public)
        self.written.append((run, kind, message))
        return True

    async def stored(self, _streams: Sequence[str], _run: str) -> AsyncIterator[Record]:
        for each in self.records:
            yield each


async def test_a_run_under_newer_rules_is_left_to_newer_programs() -> None:
    spec = run_pb2.RunSpec(run="r", protocol_version=PROTOCOL_VERSION + 1)
    ended = record(2, "ended", run_pb2.RunEnded(run="r", outcome=run_pb2.RUN_OUTCOME_COMPLETED))
    bus: Any = Stored(record(1, "created", run_pb2.RunCreated(spec=spec)), ended)
    roster, log = Roster({"coordinator": frozenset({COORDINATOR.public})}), cast(Any, None)

    with pytest.raises(Invalid, match="upgrade"):
        await Depositor(cast(Bus, bus), cast(ArtifactStore, None), roster, log).handle(ended)
    ((run, kind, notice),) = bus.written
    assert (run, kind, notice.service, notice.action) == ("r", "paused", "library", "deposit")
    assert "upgrade" in notice.detail
