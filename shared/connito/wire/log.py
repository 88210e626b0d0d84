"""Project a log of stored messages into the facts of every run."""

from __future__ import annotations

import base64
import json
from typing import Any

from connito.errors import ConnitoError, Invalid
from connito.v1 import reasons_pb2
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.heads import LogTree, LogTrees
from connito.wire.kept import Kept
from connito.wire.parts import Parts
from connito.wire.roster import Roster
from connito.wire.subjects import is_ingress, run_of
from connito.wire.verification import by_participant, verify_fact, verify_ingress

# Heads are numbered like cycles, and a few follow the last one.
HEADS_AFTER = 16
# Cycles that stay in memory, the current one included: a late reveal counts in the next one.
CYCLES_AT_HAND = 3


class Log:
    """Facts of every run seen, filled from records; one that does not verify is never applied. `trees`: for those who write or
    check heads, every stored message in the tree of its run."""

    def __init__(self, roster: Roster, trees: LogTrees | None = None) -> None:
        self.roster, self.trees = roster, trees
        self.runs: dict[str, RunFacts] = {}
        self.parts = Parts()
        self.kept: Kept | None = None

    def verified(self, record: Record) -> Fact:
        """Return what a miner said, verified. Raises `Invalid`."""
        return verify_ingress(record)

    def read(self, record: Record) -> None:
        """Take in that a message was read, applied or not."""

    def apply(self, record: Record) -> Fact | None:
        """Verify and insert. Returns the fact if it was new, None if known.

        Raises `Invalid` if it does not verify, or (FAULT) if it makes its reader fail. What is wrong with this machine, or with
        what it keeps, is no message's fault.
        """
        try:
            return self._apply(record)
        except (ConnitoError, OSError, MemoryError):
            raise
        except Exception as error:
            raise Invalid(
                f"{record.subject} makes its reader fail: {type(error).__name__}: {error}",
                reason=reasons_pb2.REASON_FAULT,
            ) from error

    def _apply(self, record: Record) -> Fact | None:
        if is_ingress(record.subject):
            fact = self.verified(record)
        else:
            if self.trees is not None:
                self.trees.add(record)
            whole = self.parts.take(record, self.roster)
            if whole is None:
                return None
            fact = verify_fact(whole, self.roster)
        facts = self.runs.setdefault(fact.run, RunFacts(fact.run, shelf=self.kept))
        if (
            facts.spec is not None
            and fact.key.cycle > facts.spec.cycles + HEADS_AFTER
            and by_participant(record.subject)
        ):
            # Of cycles that will never be there is no end; nothing asks for them, and they are not kept.
            return None
        return fact if facts.add(fact) else None

    # What is on the disk (`connito.wire.kept`).

    def restore(self, kept: Kept) -> None:
        """Begin with what is kept, and let go of there what is seldom asked for. Raises `Fatal` for a damaged file."""
        self.kept = kept
        for run, note in kept.notes():
            self.recall(run, json.loads(note))

    def recall(self, run: str, note: dict[str, Any]) -> None:
        """Take up what `note` says of a run, and the facts that are at hand."""
        if "cycle" in note:
            facts = self.runs[run] = RunFacts(run, cycle=note["cycle"], receipts=note["receipts"], shelf=self.kept)
            facts.let_go(facts.cycle - CYCLES_AT_HAND, whole=note["ended"])
            at_hand = (facts.shelved + 1, note["last"], facts.receipts + 1)
            for fact in self.kept.since(run, *at_hand) if self.kept and not note["ended"] else ():
                facts.add(fact)
        if self.trees is not None and "tree" in note:
            self.trees.runs[run] = LogTree.noted(note["tree"])
        for subject, parts in note.get("parts", {}).items():
            self.parts.waiting[subject] = {place: base64.b64decode(data) for place, data in parts.items()}

    def note(self, run: str) -> dict[str, Any]:
        """Return what follows from the log of a run besides its facts, as JSON holds it."""
        found: dict[str, Any] = {}
        facts = self.runs.get(run)
        if facts is not None:
            found |= {"cycle": facts.cycle, "ended": facts.ended is not None}
            found |= {"last": facts.last, "receipts": facts.receipts}
            if self.trees is not None and (tree := self.trees.note(facts)) is not None:
                found["tree"] = tree
        waiting = {subject: parts for subject, parts in self.parts.waiting.items() if run_of(subject) == run}
        if waiting:
            found["parts"] = {
                subject: {place: base64.b64encode(data).decode() for place, data in parts.items()}
                for subject, parts in waiting.items()
            }
        return found

    def let_go(self, run: str) -> None:
        """Keep in memory what of a run is at hand. All of it is on the disk."""
        if (facts := self.runs.get(run)) is not None:
            facts.let_go(facts.cycle - CYCLES_AT_HAND, whole=facts.ended is not None)
