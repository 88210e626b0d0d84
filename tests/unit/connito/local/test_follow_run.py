"""A run is followed to its end, and what is old of it lies on the disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.local import log as log_module
from connito.local.display import Display
from connito.wire import log as wire_log
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts

from tests.unit.connito.audit.world import RUN, tell


class Silent:
    """A display that nobody looks at."""

    def tick(self) -> None: ...

    def fact(self, fact: Fact, facts: RunFacts, names: Any) -> None: ...


async def test_old_cycles_leave_memory_and_are_there_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire_log, "CYCLES_AT_HAND", 1)
    monkeypatch.setattr(log_module, "KEEP_EVERY", 1)
    world = tell(tmp_path)
    evidence = world.evidence()

    class Broker:
        async def follow(self, streams: Sequence[str], run: str) -> AsyncIterator[Record]:
            for record in world.records:
                yield record

    facts = await log_module.follow_run(
        cast(Bus, Broker()), evidence.roster, RUN, {}, cast(Display, Silent()), lambda facts: False
    )
    whole = evidence.facts
    assert facts.cycle == whole.cycle
    assert len(facts.facts) < 0.7 * len(whole.facts)
    for key, fact in whole.facts.items():
        assert facts.fact(key.section, key.cycle, key.kind, key.id) == fact
