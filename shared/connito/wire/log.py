"""Project a log of stored messages into the facts of every run."""

from __future__ import annotations

from connito.errors import Invalid
from connito.v1 import reasons_pb2
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.heads import LogTrees
from connito.wire.parts import Parts
from connito.wire.roster import Roster
from connito.wire.subjects import is_ingress, run_of
from connito.wire.verification import by_participant, verify_fact, verify_ingress

# Heads are numbered like cycles, and a few follow the last one.
HEADS_AFTER = 16


class Log:
    """Facts of every run seen, filled from records; one that does not verify is never applied. `trees`: for those who write or
    check heads, every stored message in the tree of its run."""

    def __init__(self, roster: Roster, trees: LogTrees | None = None) -> None:
        self.roster, self.trees = roster, trees
        self.runs: dict[str, RunFacts] = {}
        self.parts = Parts()

    def verified(self, record: Record) -> Fact:
        """Return what a miner said, verified. Raises `Invalid`."""
        return verify_ingress(record)

    def read(self, record: Record) -> None:
        """Take in that a message was read, applied or not."""

    def apply(self, record: Record) -> Fact | None:
        """Verify and insert. Returns the fact if it was new, None if known.

        Raises `Invalid` if it does not verify, or (FAULT) if it makes its reader fail.
        """
        try:
            return self._apply(record)
        except Invalid:
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
                # A head covers every stored message, also one that does not verify.
                self.trees.of(run_of(record.subject)).add(record)
            whole = self.parts.take(record, self.roster)
            if whole is None:
                return None
            fact = verify_fact(whole, self.roster)
        facts = self.runs.setdefault(fact.run, RunFacts(fact.run))
        if (
            facts.spec is not None
            and fact.key.cycle > facts.spec.cycles + HEADS_AFTER
            and by_participant(record.subject)
        ):
            # Of cycles that will never be there is no end; nothing asks for them, and they are not kept.
            return None
        return fact if facts.add(fact) else None
