"""Checks of a log against its signed heads and receipts: nothing in it was taken away, changed, added or exchanged.

Pure. A head is held against what is in the log; one that somebody else kept (a witness, a miner's receipt) against the
same, so that a second history is found whoever it was shown to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from connito.audit.differences import Difference, Step
from connito.audit.evidence import Evidence
from connito.errors import Invalid, Retry
from connito.render import formats
from connito.wire.checkpoint import Checkpoint, cosigned_at
from connito.wire.fact import Record
from connito.wire.heads import LogTrees, ingress_origin_of, leaf_of, origin_of
from connito.wire.identity import short_key
from connito.wire.merkle import Tree
from connito.wire.subjects import ROOT


@dataclass(frozen=True)
class History:
    """Outcome of the heads of a run. `cuts` is how far the last good one reaches, by stream; `roots` are theirs, by size."""

    step: Step
    cuts: Mapping[str, int]
    roots: Mapping[int, bytes]

    def covers(self, record: Record) -> bool:
        """Return whether a head stands for a message, as it is."""
        return record.sequence <= self.cuts.get(record.stream, 0)


def read(evidence: Evidence) -> History:
    """Check every head against the messages that it covers, and the cosignatures under it."""
    facts, trees = evidence.facts, LogTrees()
    for record in evidence.records:
        trees.of(evidence.run).add(record)
    found, number, vouched = [*_missing(evidence)], 1, 0
    cuts, roots = dict[str, int](), dict[int, bytes]()
    while (fact := facts.head(number)) is not None:
        try:
            checkpoint = trees.checkpoint(facts, number)
        except (Invalid, Retry) as error:
            found.append(Difference("heads", f"run.{number}.head", str(error)))
            break
        cuts = {cut.stream: cut.last_sequence for cut in fact.message.cuts}
        roots[checkpoint.size] = checkpoint.root
        found += _cosignatures(evidence, number, checkpoint)
        vouched = len(facts.cosigned(number))
        number += 1
    tree, total = trees.of(evidence.run).tree, sum(1 for record in evidence.records if record.stream != "INGRESS")
    note = (
        f"the last one covers {tree.size} of {formats.count(total, 'message')}, "
        f"cosigned by {vouched} of {formats.count(len(facts.joined), 'validator')}"
    )
    return History(Step("heads", 0, number - 1, tuple(found), note), cuts, roots)


def _missing(evidence: Evidence) -> Iterator[Difference]:
    """Yield heads that have to be there by what lies behind them. A few can say that they cosigned one that never was."""
    facts = evidence.facts
    known = {(key.kind, key.cycle) for key in facts.facts if key.section == "run"}
    cosigned = {number for kind, number in known if kind == "cosigned"}
    believed = {number for number in cosigned if 2 * len(facts.cosigned(number)) > len(facts.joined)}
    told = believed | {number for kind, number in known if kind == "head"}
    last = max([facts.cycle, *told])
    # One head a cycle, one behind the end and one behind the deposit. Any number can be said, and none is counted up to.
    for number in sorted(told | set(range(1, min(last, facts.cycle + 2) + 1))):
        if facts.head(number) is None:
            yield Difference("heads", f"run.{number}.head", "is not in the log, but what follows it is")
    for number in sorted(number for number in cosigned if number > last):
        for key in facts.cosigned(number):
            where = f"run.{number}.cosigned.{key}"
            yield Difference("heads", where, "is of a head that the log does not hold", by=f"validator {key}")


def _cosignatures(evidence: Evidence, number: int, checkpoint: Checkpoint) -> Iterator[Difference]:
    """Yield cosignatures that are not of this head: the operator's doing when most validators say so, else their authors'."""
    signatures = {key: fact.message.signature for key, fact in evidence.facts.cosigned(number).items()}
    others = [key for key, line in signatures.items() if not cosigned_at(checkpoint, key, line)]
    if 2 * len(others) > len(evidence.facts.joined) > 1:
        yield Difference(
            "heads", f"run.{number}.head", f"{formats.count(len(others), 'validator')} cosigned another one"
        )
        return
    for key in others:
        where = f"run.{number}.cosigned.{key}"
        yield Difference("heads", where, "is no cosignature of this head", by=f"validator {key}")


def receipts(evidence: Evidence) -> Step:
    """Check the committer's receipts against what miners said."""
    facts, found, given = evidence.facts, list[Difference](), list[Checkpoint]()
    said = [record.sequence for record in evidence.records if record.stream == "INGRESS"]
    while (fact := facts.received(len(given) + 1)) is not None:
        given.append(Checkpoint.parse(fact.message.checkpoint))
        if given[-1].origin != ingress_origin_of(facts) or not given[-1].is_signed_by(fact.signer):
            found.append(Difference("receipts", f"run.{len(given)}.received", "is of another log, or not signed"))
        inside = bisect_right(said, fact.message.last_sequence)
        if inside != given[-1].size:
            what = f"is for {formats.count(given[-1].size, 'message')}; {inside} lie up to INGRESS {fact.message.last_sequence}"
            found.append(Difference("receipts", f"run.{len(given)}.received", what))
    roots = _ingress_roots(evidence, {receipt.size for receipt in given})
    for number, receipt in enumerate(given, start=1):
        if what := _of_ingress(roots, receipt):
            found.append(Difference("receipts", f"run.{number}.received", what))
    covered = max((receipt.size for receipt in given), default=0)
    note = f"the last one covers {covered} of {max(roots)} messages of miners"
    return Step("receipts", 0, len(given), tuple(found), note)


def kept(evidence: Evidence, history: History, notes: Mapping[str, str]) -> Step:
    """Check checkpoints that somebody else kept, by where they come from: a witness', or a receipt that a miner got.

    One that the log's own key signed and that is not of this log proves that there were two. Raises `Invalid` for one that proves
    nothing: it is no checkpoint, is of another log, or that key did not sign it.
    """
    found, vouched = list[Difference](), set[str]()
    for source, note in notes.items():
        checkpoint = Checkpoint.parse(note)
        vouched |= checkpoint.cosigners().keys()
        ingress = checkpoint.origin == ingress_origin_of(evidence.facts)
        if not ingress and checkpoint.origin != origin_of(evidence.facts):
            if not checkpoint.origin.startswith(f"{ROOT}/{evidence.run}/"):
                raise Invalid(f"{source} says nothing about this run: it is of {checkpoint.origin}")
            ingress = checkpoint.origin.endswith("/ingress")
        signers = [*filter(checkpoint.is_signed_by, evidence.roster.ever("committer" if ingress else "coordinator"))]
        if not signers:
            raise Invalid(f"{source} proves nothing: the log's own signature is not under it, or does not hold")
        roots = _ingress_roots(evidence, {checkpoint.size}) if ingress else {}
        if not (what := _begun_anew(evidence, checkpoint)):
            what = _of_ingress(roots, checkpoint) if ingress else _of_heads(history, checkpoint)
        if what:
            # Nothing in a checkpoint dates it: an operator could void what it signed by a change of keys.
            old = "; by a key that is retired, which whoever has it can still sign with"
            what += old if all(key in evidence.roster.retired for key in signers) else ""
            found.append(Difference("history", source, f"two histories were signed: {what}"))
    note = "cosigned by " + ", ".join(map(short_key, sorted(vouched))) if vouched else ""
    return Step("history", 0, len(notes), tuple(found), note)


def _begun_anew(evidence: Evidence, checkpoint: Checkpoint) -> str:
    mine = origin_of(evidence.facts)
    return "" if checkpoint.origin.removesuffix("/ingress") == mine else f"{checkpoint.origin} is called {mine} here"


def _of_heads(history: History, checkpoint: Checkpoint) -> str:
    root = history.roots.get(checkpoint.size)
    if root == checkpoint.root:
        return ""
    last = max(history.roots, default=0)
    if checkpoint.size > last:
        return f"it stands for {formats.count(checkpoint.size, 'message')}, the heads in this log for {last} at most"
    return f"the log's first {formats.count(checkpoint.size, 'message')} are others here"


def _of_ingress(roots: Mapping[int, bytes], checkpoint: Checkpoint) -> str:
    if roots.get(checkpoint.size) == checkpoint.root:
        return ""
    if checkpoint.size > max(roots):
        return f"it stands for {formats.count(checkpoint.size, 'message')} of miners, INGRESS holds {max(roots)}"
    return f"the first {formats.count(checkpoint.size, 'message')} of miners are others here"


def _ingress_roots(evidence: Evidence, sizes: set[int]) -> dict[int, bytes]:
    """Return the root over the first messages of miners for each number of them that is asked for, and for all."""
    tree, roots = Tree(), {0: Tree().root}
    for record in evidence.records:
        if record.stream == "INGRESS":
            tree.append(leaf_of(record))
            if tree.size in sizes:
                roots[tree.size] = tree.root
    return {**roots, tree.size: tree.root}
