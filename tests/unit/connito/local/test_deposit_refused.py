"""`connito up` does not wait for a deposit that the library has put aside."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from connito.bus import Bus
from connito.errors import Invalid, Retry
from connito.local import log
from connito.v1.cycle_pb2 import DeadLetter
from connito.wire.envelope import seal
from connito.wire.fact import Record
from connito.wire.identity import Identity

LIBRARY = Identity.generate()


class Broker:
    """The end of a run, and a dead letter of it after some looks."""

    def __init__(self, letter_after: int) -> None:
        self.looks, self.letter_after = 0, letter_after

    async def last_record(self, subject: str) -> Record | None:
        assert subject == "connito.v1.r.run.0.ended"
        self.looks += 1
        if self.looks == 1:
            raise Retry("away")
        return None if self.looks == 2 else Record("RUNS", 17, subject, b"", 0)

    async def look(self, stream: str, last_by_subj: str) -> Record | None:
        assert (stream, last_by_subj) == ("DLQ", "connito.dlq.v1.RUNS.17")
        if self.looks < self.letter_after:
            return None
        letter = DeadLetter(stream="RUNS", sequence=17, detail="its handling ended the process 2 times")
        return Record("DLQ", 1, last_by_subj, seal(LIBRARY, last_by_subj, letter).SerializeToString(), 0)


async def test_it_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_LETTER_SECONDS", 0.001)
    with pytest.raises(Invalid, match=r"put the expert of r aside: its handling ended .* `connito dlq retry`"):
        await asyncio.wait_for(log.deposit_refused(cast(Bus, Broker(5)), "r"), 10)


async def test_it_waits_as_long_as_there_is_no_letter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_LETTER_SECONDS", 0.0001)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(log.deposit_refused(cast(Bus, Broker(10**9)), "r"), 0.2)
