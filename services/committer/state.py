"""Keep the facts of every run, each reveal that was sent, and how far each stream was read."""

from __future__ import annotations

from collections import defaultdict

from connito.bus.position import PositionedLog
from connito.protocol.quota import MessageCounter
from connito.v1 import cycle_pb2
from connito.wire.fact import Fact, Record
from connito.wire.roster import Roster
from connito.wire.verification import verify_ingress

# What a judgement rests on.
FACTS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT")
STREAMS = (*FACTS, "INGRESS")


class State(PositionedLog):
    """`said` counts each miner's messages.

    `reveals` holds every reveal by run and INGRESS sequence: of several by one miner `RunFacts` keeps the first."""

    def __init__(self, roster: Roster) -> None:
        super().__init__(roster)
        self.said: defaultdict[str, MessageCounter] = defaultdict(MessageCounter)
        self.reveals: defaultdict[str, dict[int, Fact]] = defaultdict(dict)

    def apply(self, record: Record) -> Fact | None:
        """Apply a record as `PositionedLog.apply` does, and keep reveals."""
        new = super().apply(record)
        if not record.subject.endswith((".reveal", ".commitment")):
            return new
        said = new or verify_ingress(record)
        self.said[said.run].add(said)
        if isinstance(said.message, cycle_pb2.Reveal):
            self.reveals[said.run][record.sequence] = said
        return new
