"""Keep the facts of every run, each reveal that was sent, and how far each stream was read."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from connito.bus.offences import kind_of, report
from connito.bus.position import PositionedLog
from connito.errors import Invalid
from connito.protocol.entitlement import Naming
from connito.protocol.quota import LETTERS_PER_KEY
from connito.runtime.limits import RateLimit
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.wire.checkpoint import Checkpoint
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.heads import leaf_of
from connito.wire.log import CYCLES_AT_HAND
from connito.wire.merkle import Tree
from connito.wire.roster import Roster
from connito.wire.subjects import FactKey, run_of
from connito.wire.verification import INGRESS, verify_ingress
from google.protobuf.message import DecodeError

from . import judging
from .said import Said, counted

# What a judgement rests on.
FACTS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT")
# What names artifacts: who may download what follows from these.
NAMING = ("RUNS", "TRAIN", "MERGE", "LIBRARY")
STREAMS = (*FACTS, "MERGE", "LIBRARY", "INGRESS")

STRAYS_PER_SECOND = 0.25
MAX_OVER, MAX_VERIFIED = 100_000, 4096


@dataclass
class Heard:
    """Messages of the miners of a run, as the tree that receipts are over; and the number and size of the newest receipt."""

    tree: Tree = field(default_factory=Tree)
    last_sequence: int = 0
    number: int = 0
    covered: int = 0

    def add(self, record: Record) -> None:
        """Take in a message, whatever is in it, in the order of the stream."""
        if record.sequence > self.last_sequence:
            self.last_sequence = record.sequence
            self.tree.append(leaf_of(record))

    def note(self) -> list[Any]:
        """Return all of it as JSON holds it, for `noted`."""
        subtrees = [one.hex() for one in self.tree.subtrees]
        return [self.tree.size, subtrees, self.last_sequence, self.number, self.covered]

    @classmethod
    def noted(cls, note: list[Any]) -> Heard:
        """Return what `note` was made of."""
        size, subtrees, *rest = note
        return cls(Tree(size, [bytes.fromhex(one) for one in subtrees]), *rest)

    def given(self, receipt: run_pb2.IngressHead) -> None:
        """Take in a receipt that was written."""
        if receipt.cycle > self.number:
            self.number, self.covered = receipt.cycle, Checkpoint.parse(receipt.checkpoint).size


class State(PositionedLog):
    """`said` has every message of each run's miners.

    `reveals` holds the reveals that a cycle may still count, by run and INGRESS sequence. What a key may
    cost is bounded before its signatures are checked: `needless` says of whom everything further goes without an answer.
    """

    def __init__(self, roster: Roster, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(roster)
        self._said: dict[str, Said] = {}
        self.reveals: defaultdict[str, dict[int, Fact]] = defaultdict(dict)
        self._pending: defaultdict[str, dict[int, Fact]] = defaultdict(dict)
        self.naming = Naming()
        self.heard: defaultdict[str, Heard] = defaultdict(Heard)
        # By run, key, kind and cycle, the first message over the quota: it is told so, and what comes after it goes unread.
        self._over: dict[tuple[str, str, str, int], int] = {}
        self._letters: Counter[tuple[str, str]] = Counter()
        self._strays = RateLimit(STRAYS_PER_SECOND, LETTERS_PER_KEY, clock)
        self._verified: OrderedDict[int, Fact | Invalid] = OrderedDict()

    def apply(self, record: Record) -> Fact | None:
        """Apply a record as `PositionedLog.apply` does, and keep reveals."""
        if record.stream == "INGRESS":
            self.heard[run_of(record.subject)].add(record)
            if _for_others(record) or self._without_an_answer(record):
                self.read(record)
                return None
        try:
            new = super().apply(record)
        except Invalid:
            if record.stream != "INGRESS":
                raise
            # Reported by whoever handles it: each message once.
            return None
        if new is not None:
            self.naming.add(new)
            if isinstance(new.message, run_pb2.IngressHead):
                self.heard[new.run].given(new.message)
        if not record.subject.endswith((".reveal", ".commitment")):
            return new
        said = new or self.verified(record)
        self._count(said)
        self._pending[said.run][record.sequence] = said
        if isinstance(said.message, cycle_pb2.Reveal):
            self.reveals[said.run][record.sequence] = said
        return new

    def _said_in(self, run: str) -> Said:
        if run not in self._said:
            self._said[run] = Said(f"{run}/said", shelf=self.kept)
        return self._said[run]

    def _spec(self, run: str) -> run_pb2.RunSpec | None:
        facts = self.runs.get(run)
        return None if facts is None else facts.spec

    def over(self, fact: Fact) -> bool:
        """Return whether a message is beyond what its run's policy answers one by one."""
        spec = self._spec(fact.run)
        return spec is not None and self._said_in(fact.run).over(fact, spec)

    def _count(self, said: Fact) -> None:
        spec = self._spec(said.run)
        self._said_in(said.run).hear(said, spec)
        if spec is not None and self.over(said) and len(self._over) < MAX_OVER:
            place = (said.run, said.signer, said.key.kind, counted(said.key.cycle, spec))
            self._over[place] = min(said.sequence, self._over.get(place, said.sequence))

    # What is on the disk.

    def recall(self, run: str, note: dict[str, Any]) -> None:
        """Take up what is kept of a run."""
        super().recall(run, note)
        self.naming.recall(run, note.get("naming", ()))
        if "heard" not in note:
            return
        self.heard[run] = Heard.noted(note["heard"])
        said = self._said_in(run)
        said.let_go(note["cycle"] - CYCLES_AT_HAND, whole=note["ended"])
        for fact in self.kept.since(said.run, said.shelved + 1) if self.kept and not note["ended"] else ():
            said.add(fact)
        for name, found in (("pending", self._pending[run]), ("reveals", self.reveals[run])):
            for place in note[name]:
                fact = said.at(run, FactKey(*place))
                found[fact.sequence] = fact

    def note(self, run: str) -> dict[str, Any]:
        """Return what is to be kept of a run."""
        self._forget_settled(run)
        found = super().note(run) | {"naming": self.naming.of(run)}
        if run in self.runs:
            said, spec = self._said_in(run), self._spec(run)
            for name, facts in (("pending", self._pending[run]), ("reveals", self.reveals[run])):
                keys = [said.place(fact, spec) for fact in facts.values()]
                places = [(key.section, key.cycle, key.kind, key.id) for key in keys]
                found[name] = [list(place) for place in places if said.has(*place)]
            found["heard"] = self.heard[run].note()
        return found

    def let_go(self, run: str) -> None:
        """Keep in memory what of a run is at hand."""
        super().let_go(run)
        facts = self.runs.get(run)
        if facts is None:
            return
        self._said_in(run).let_go(facts.cycle - CYCLES_AT_HAND, whole=facts.ended is not None)
        closed = facts.window("submit", facts.cycle - 2).closed
        counts_after = -1 if closed is None else closed.last_sequence
        for sequence in [one for one in self.reveals[run] if one <= counts_after or facts.ended is not None]:
            del self.reveals[run][sequence]

    def _forget_settled(self, run: str) -> None:
        """Wait no longer for what lies in front of the close of a window that is settled: it has its answer, or never will."""
        facts = self.runs.get(run)
        if facts is None:
            return
        windows = [facts.window(name, cycle) for cycle in facts.recent for name in ("commit", "submit")]
        ends = [window.require_closed().last_sequence for window in windows if window.closed and window.settled]
        last = max(ends, default=0)
        for sequence in [one for one in self._pending[run] if one <= last or facts.ended is not None]:
            del self._pending[run][sequence]

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

    def unanswered(self, run: str, last: int) -> int | None:
        """Return a message of a run up to `last` that has no answer in the facts yet and will get one; None where there is none.

        Asked after every answer: what has one is looked at once, and of the others the first.
        """
        pending, facts = self._pending[run], self.runs[run]
        for sequence in [sequence for sequence in pending if sequence <= last]:
            if not self.over(pending[sequence]) and not judging.answered(facts, pending[sequence]):
                return sequence
            del pending[sequence]
        return None

    def earlier(self, fact: Fact) -> list[int]:
        """Return the messages before this one, by the same key, of its kind and cycle, that have no answer in the facts yet."""
        pending, facts = self._pending[fact.run], self.runs[fact.run]
        places = self._said_in(fact.run).before(fact, self._spec(fact.run))
        before = [place for place in places if place in pending and pending[place].key.cycle == fact.key.cycle]
        return [place for place in before if not judging.answered(facts, pending[place])]

    def worth_a_letter(self, record: Record, error: Invalid) -> bool:
        """Report what nobody can be answered about; return whether it is one of the first few, which are kept."""
        # The broker let only the subject's owner write there.
        owner = owner_of(record)
        # Whose signature does not hold may not have written it: no key is reported for it.
        key = "" if error.reason == reasons_pb2.REASON_BAD_SIGNATURE else owner
        report(kind_of(error.reason), key=key, subject=record.subject, reason=error.reason, detail=str(error))
        self._letters[run_of(record.subject), owner] += 1
        return self._letters[run_of(record.subject), owner] <= LETTERS_PER_KEY

    def needless(self, record: Record) -> bool:
        """Return whether a message goes without an answer, and count what is about a run that does not exist."""
        if self._without_an_answer(record):
            return True
        if self._letters[run_of(record.subject), owner_of(record)] >= LETTERS_PER_KEY:
            try:
                self.verified(record)
            except Invalid as error:
                return not self.worth_a_letter(record, error)
        facts = self.runs.get(run_of(record.subject))
        if facts is None or facts.spec is None:
            try:
                self._strays.take(owner_of(record))
            except Invalid as error:
                report("quota", key=owner_of(record), subject=record.subject, reason=error.reason, detail="no such run")
                return True
        return _for_others(record)

    def _without_an_answer(self, record: Record) -> bool:
        facts = self.runs.get(run_of(record.subject)) if self._over else None
        if facts is None or facts.spec is None:
            return False
        kind = record.subject.rpartition(".")[2]
        first = self._over.get((facts.run, owner_of(record), kind, _cycle_of(record, kind, facts)))
        return first is not None and record.sequence > first


def owner_of(record: Record) -> str:
    """Return the key that alone may write on a message's subject."""
    return record.subject.split(".")[4]


def _for_others(record: Record) -> bool:
    """Return whether a message is the coordinator's to read, whatever is in it."""
    return record.subject.endswith(".trained")


def lane_of(record: Record) -> str:
    """Return the lane of a message: what one key says in one run waits for nothing else."""
    return f"{run_of(record.subject)} {owner_of(record)}"


def _cycle_of(record: Record, kind: str, facts: RunFacts) -> int:
    """Return the cycle that a message claims, unverified; -1 where it cannot be read."""
    if kind not in INGRESS:
        return -1
    try:
        message = INGRESS[kind].FromString(Envelope.FromString(record.data).payload)
        return counted(int(getattr(message, "cycle", 0)), facts.spec)
    except DecodeError:
        return -1
