from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.service.keeping import EVERY_MESSAGES, EVERY_SECONDS, MOST_MESSAGES, REST, Keeping
from connito.wire.fact import Record
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster


class Slow(Log):
    """A log whose notes take a while, by a clock that nothing else moves."""

    def __init__(self, takes: float) -> None:
        super().__init__(Roster())
        self.now, self.takes, self.noted = 0.0, takes, list[float]()

    def note(self, run: str) -> dict[str, Any]:
        self.noted.append(self.now)
        self.now += self.takes
        return {}


@pytest.mark.parametrize("takes", [0.0, 1.0])
def test_what_takes_long_to_keep_is_kept_less_often_however_much_comes(takes: float) -> None:
    log = Slow(takes)
    bus = SimpleNamespace(host=SimpleNamespace(monotonic=lambda: log.now))
    keeping = Keeping(Kept(), log, cast(Bus, bus))
    for sequence in range(3 * EVERY_MESSAGES):
        keeping.read(Record("TRAIN", sequence + 1, "connito.v1.r.train.1.opened", b"", 1))
        log.now += EVERY_SECONDS / EVERY_MESSAGES / 2
    assert len(log.noted) == (2 if takes else 3), "at once, and when so many wait"
    log.now += REST * takes + EVERY_SECONDS
    before = len(log.noted)
    keeping.read(Record("TRAIN", 1 << 20, "connito.v1.r.train.1.opened", b"", 1))
    assert len(log.noted) == before + 1


def test_a_long_log_is_not_gathered_in_memory_however_long_keeping_takes() -> None:
    log = Slow(60.0)
    keeping = Keeping(Kept(), log, cast(Bus, SimpleNamespace(host=SimpleNamespace(monotonic=lambda: log.now))))
    for sequence in range(10 * MOST_MESSAGES):
        keeping.read(Record("TRAIN", sequence + 1, "connito.v1.r.train.1.opened", b"", 1))
    assert 9 <= len(log.noted) <= 11
