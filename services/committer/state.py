"""Keep the facts of every run, each reveal that was sent, and how far each stream was read."""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable

from connito.bus.offences import report
from connito.bus.position import PositionedLog
from connito.errors import Invalid
from connito.protocol.quota import LETTERS_PER_KEY, MessageCounter
from connito.runtime.limits import RateLimit
from connito.v1 import cycle_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.roster import Roster
from connito.wire.subjects import run_of
from connito.wire.verification import INGRESS, verify_ingress
from google.protobuf.message import DecodeError

# What a judgement rests on.
FACTS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT")
STREAMS = (*FACTS, "INGRESS")

STRAYS_PER_SECOND = 0.25
MAX_TOLD, MAX_VERIFIED = 100_000, 4096


class State(PositionedLog):
    """`said` counts each miner's messages.

    `reveals` holds every reveal by run and INGRESS sequence: of several by one miner `RunFacts` keeps the first. What a key may
    cost is bounded before its signatures are checked: `needless` says of whom everything further goes without an answer.
    """

    def __init__(self, roster: Roster, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(roster)
        self.said: defaultdict[str, MessageCounter] = defaultdict(MessageCounter)
        self.reveals: defaultdict[str, dict[int, Fact]] = defaultdict(dict)
        # Whoever reads everything from the beginning has not read of every run yet.
        self.live = False
        self._told: set[tuple[str, str, str, int]] = set()
        self._strays = RateLimit(STRAYS_PER_SECOND, LETTERS_PER_KEY, clock)
        self._verified: OrderedDict[int, Fact | Invalid] = OrderedDict()

    def apply(self, record: Record) -> Fact | None:
        """Apply a record as `PositionedLog.apply` does, and keep reveals."""
        if record.stream == "INGRESS" and self.live and self._without_an_answer(record):
            self.read(record)
            return None
        new = super().apply(record)
        if not record.subject.endswith((".reveal", ".commitment")):
            return new
        said = new or self.verified(record)
        self.said[said.run].add(said)
        if isinstance(said.message, cycle_pb2.Reveal):
            self.reveals[said.run][record.sequence] = said
        return new

    def verified(self, record: Record) -> Fact:
        """Return what a miner said, verified once, whether it comes through the log or the work queue first. Raises `Invalid`."""
        found = self._verified.pop(record.sequence, None)
        if found is None:
            try:
                found = verify_ingress(record)
            except Invalid as error:
                found = error
            self._verified[record.sequence] = found
            if len(self._verified) > MAX_VERIFIED:
                self._verified.popitem(last=False)
        if isinstance(found, Invalid):
            raise found
        return found

    def told(self, fact: Fact) -> None:
        """Note that whatever its sender says further of this kind and cycle is over the quota, and that it was told so."""
        facts = self.runs.get(fact.run)
        if facts is not None and facts.spec is not None and len(self._told) < MAX_TOLD:
            self._told.add((fact.run, fact.signer, fact.key.kind, _counted(fact.key.cycle, facts)))

    def needless(self, record: Record) -> bool:
        """Return whether a message goes without an answer whatever is in it, and count one about a run that does not exist."""
        if self._without_an_answer(record):
            return True
        facts = self.runs.get(run_of(record.subject))
        if facts is None or facts.spec is None:
            try:
                self._strays.take(owner_of(record))
            except Invalid as error:
                report("quota", key=owner_of(record), subject=record.subject, reason=error.reason, detail="no such run")
                return True
        return False

    def _without_an_answer(self, record: Record) -> bool:
        facts = self.runs.get(run_of(record.subject))
        if facts is None or facts.spec is None or not self._told:
            return False
        kind = record.subject.rpartition(".")[2]
        return (facts.run, owner_of(record), kind, _cycle_of(record, kind, facts)) in self._told


def owner_of(record: Record) -> str:
    """Return the key that alone may write on a message's subject: its lane."""
    return record.subject.split(".")[4]


def _counted(cycle: int, facts: RunFacts) -> int:
    """Return the cycle that a message counts in; those that the run does not have count as one."""
    return cycle if 1 <= cycle <= facts.require_spec().cycles else 0


def _cycle_of(record: Record, kind: str, facts: RunFacts) -> int:
    """Return the cycle that a message claims, unverified; -1 where it cannot be read."""
    if kind not in INGRESS:
        return -1
    try:
        message = INGRESS[kind].FromString(Envelope.FromString(record.data).payload)
        return _counted(int(getattr(message, "cycle", 0)), facts)
    except DecodeError:
        return -1
