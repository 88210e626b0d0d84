"""The committer's projection: the facts of every run, each reveal that was said, and how far each stream was read."""

from __future__ import annotations

from collections import defaultdict

from connito.facts import Fact, Record, verify_ingress
from connito.position import PositionedLog
from connito.roster import Roster
from connito.v1 import cycle_pb2

# What a judgement rests on.
FACTS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT")
STREAMS = (*FACTS, "INGRESS")


class View(PositionedLog):
    """`reveals` holds every reveal by run and INGRESS sequence: of several by one miner `RunFacts` keeps the first."""

    def __init__(self, roster: Roster) -> None:
        super().__init__(roster)
        self.reveals: defaultdict[str, dict[int, Fact]] = defaultdict(dict)

    def apply(self, record: Record) -> Fact | None:
        """As `PositionedLog.apply`, keeping reveals."""
        said = super().apply(record)
        if not record.subject.endswith(".reveal"):
            return said
        reveal = said or verify_ingress(record)
        if isinstance(reveal.message, cycle_pb2.Reveal):
            self.reveals[reveal.run][record.sequence] = reveal
        return said
