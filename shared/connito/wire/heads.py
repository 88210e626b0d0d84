"""The log of a run as one Merkle tree, and the signed heads that stand for it.

A leaf is one stored message: where it lies, when the broker stored it, what it says. A head covers, stream by stream in the order
of `STREAMS`, every message of the run up to its cuts that no head before it covers; so its tree is the one before, with
leaves added. Whoever has read the log builds the same tree. What miners say (INGRESS) has a tree of its own, under the
committer's receipts, which are leaves here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from connito.errors import Invalid, Retry
from connito.v1 import run_pb2
from connito.wire.checkpoint import Checkpoint
from connito.wire.fact import Record
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.merkle import Tree, leaf_hash
from connito.wire.subjects import ROOT, run_of

# As heads cover them.
STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE", "LIBRARY")
# What the library hears of an expert once its run has ended is not of the run.
_AFTERWARDS = re.compile(r"connito\.v1\.[^.]+\.library\.0\.(notice|used)\.")


def origin_of(facts: RunFacts) -> str:
    """Return the name of a run's log in its checkpoints: no other log has it, not even of a run that is called the same."""
    return f"{ROOT}/{facts.run}/{facts.log_id[:32]}"


def ingress_origin_of(facts: RunFacts) -> str:
    """Return the same for what miners say."""
    return f"{origin_of(facts)}/ingress"


def leaf_of(record: Record) -> bytes:
    """Return the leaf hash of a message: stream, sequence, broker's time in milliseconds, subject and bytes, each behind its
    length in 4 bytes.
    """
    parts = (record.stream, str(record.sequence), str(record.time_unix_ms), record.subject)
    fields = [*(part.encode() for part in parts), record.data]
    return leaf_hash(b"".join(len(part).to_bytes(4, "big") + part for part in fields))


@dataclass
class LogTree:
    """The tree of one run, over what heads cover, and the leaves that none covers yet. `number` is the last head's."""

    tree: Tree = field(default_factory=Tree)
    number: int = 0
    _pending: dict[str, list[tuple[int, bytes]]] = field(default_factory=dict)
    _covered: dict[str, int] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Take in a stored message, valid or not; each stream in its order."""
        if record.stream in STREAMS and not _AFTERWARDS.match(record.subject):
            waiting = self._pending.setdefault(record.stream, [])
            if record.sequence > max(self._covered.get(record.stream, 0), waiting[-1][0] if waiting else 0):
                waiting.append((record.sequence, leaf_of(record)))

    def head(self, facts: RunFacts, identity: Identity) -> run_pb2.LogHead:
        """Return the next head over everything that was read, signed."""
        cuts = {**self._covered, **{stream: leaves[-1][0] for stream, leaves in self._pending.items() if leaves}}
        tree = self._up_to(cuts)
        checkpoint = Checkpoint(origin_of(facts), tree.size, tree.root).signed(identity)
        named = [run_pb2.StreamCut(stream=one, last_sequence=cuts[one]) for one in STREAMS if one in cuts]
        return run_pb2.LogHead(run=facts.run, cycle=self.number + 1, checkpoint=checkpoint.note, cuts=named)

    def check(self, facts: RunFacts, head: run_pb2.LogHead, signer: str) -> Checkpoint:
        """Return the checkpoint of the next head and let it cover what it covers.

        Raises `Invalid` when it is not of the log as it was read here, `Retry` when that was not read yet.
        """
        checkpoint = Checkpoint.parse(head.checkpoint)
        if head.cycle != self.number + 1:
            raise Invalid(f"head {head.cycle} follows head {self.number}")
        if checkpoint.origin != origin_of(facts) or not checkpoint.is_signed_by(signer):
            raise Invalid(f"the checkpoint of head {head.cycle} is of another log, or its signature does not hold")
        cuts = {cut.stream: cut.last_sequence for cut in head.cuts}
        tree = self._up_to(cuts)
        if (tree.size, tree.root) != (checkpoint.size, checkpoint.root):
            raise Invalid(
                f"head {head.cycle} stands for {checkpoint.size} messages that are not the {tree.size} read here"
            )
        self._pending = {
            stream: [leaf for leaf in leaves if leaf[0] > cuts.get(stream, 0)]
            for stream, leaves in self._pending.items()
        }
        self.tree, self.number, self._covered = tree, head.cycle, cuts
        return checkpoint

    def note(self) -> dict[str, Any]:
        """Return the tree as JSON holds it, for `noted`."""
        pending = {stream: [[place, leaf.hex()] for place, leaf in leaves] for stream, leaves in self._pending.items()}
        tree = [self.tree.size, [one.hex() for one in self.tree.subtrees]]
        return {"tree": tree, "number": self.number, "pending": pending, "covered": self._covered}

    @classmethod
    def noted(cls, note: Mapping[str, Any]) -> LogTree:
        """Return the tree that `note` was made of."""
        size, subtrees = note["tree"]
        pending = {
            stream: [(place, bytes.fromhex(leaf)) for place, leaf in leaves]
            for stream, leaves in note["pending"].items()
        }
        return cls(Tree(size, [bytes.fromhex(one) for one in subtrees]), note["number"], pending, dict(note["covered"]))

    def _up_to(self, cuts: Mapping[str, int]) -> Tree:
        tree = self.tree.copy()
        for stream, before in self._covered.items():
            if cuts.get(stream, 0) < before:
                raise Invalid(f"a head covers {stream} up to {cuts.get(stream, 0)}, the one before it up to {before}")
        for stream in STREAMS:
            leaves, cut = self._pending.get(stream, []), cuts.get(stream, 0)
            inside = [leaf for sequence, leaf in leaves if sequence <= cut]
            last = leaves[-1][0] if leaves else self._covered.get(stream, 0)
            if last < cut:
                raise Retry(f"{stream} was read up to {last} of {cut}")
            for leaf in inside:
                tree.append(leaf)
        return tree


@dataclass
class LogTrees:
    """The trees of every run that is read."""

    runs: dict[str, LogTree] = field(default_factory=dict)

    def of(self, run: str) -> LogTree:
        """Return the tree of a run."""
        return self.runs.setdefault(run, LogTree())

    def add(self, record: Record) -> None:
        """Take in a stored message, also one that does not verify: a head covers it."""
        self.of(run_of(record.subject)).add(record)

    def note(self, facts: RunFacts) -> dict[str, Any] | None:
        """Return a run's tree as `LogTree.note`, as far as its heads go; None for what is no run."""
        if facts.spec is None:
            return None
        # One that is not of the log, or covers what was not read yet, is told of by whoever acts on it.
        with suppress(Invalid, Retry):
            self.checkpoint(facts, facts.next_head - 1)
        return self.of(facts.run).note()

    def checkpoint(self, facts: RunFacts, number: int) -> Checkpoint:
        """Return the checkpoint of a head that is known, checked with all before it. Raises as `LogTree.check`."""
        tree = self.of(facts.run)
        while tree.number < number:
            tree.check(facts, *self._head(facts, tree.number + 1))
        # Its text is what was checked: the fact stands as it was written.
        return Checkpoint.parse(self._head(facts, number)[0].checkpoint)

    @staticmethod
    def _head(facts: RunFacts, number: int) -> tuple[run_pb2.LogHead, str]:
        fact = facts.head(number)
        if fact is None:
            raise Invalid(f"head {number} is not in the log, and one that follows it is")
        return fact.message, fact.signer
