"""Facts that settle a closed window, as a pure function of the run's facts.

Called when everything up to the close has been handled and the facts are current. Membership is by sequence: an
accepted message beyond `last_sequence` was accepted before the close was known, and is refused here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from connito.protocol import bans
from connito.protocol.findings import Refusal
from connito.protocol.scoring.newcomers import over_quota, quota_refusal
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts

from . import judging

WINDOWS = ("commit", "submit")


@dataclass(frozen=True)
class Write:
    """One fact to publish."""

    section: str
    cycle: int
    kind: str
    id: str
    message: cycle_pb2.CommitmentAccepted | cycle_pb2.RevealAccepted | cycle_pb2.Refused | cycle_pb2.WindowSettled


def due(facts: RunFacts) -> Iterator[tuple[str, int]]:
    """Yield windows that are closed and not settled yet."""
    if facts.ended is not None:
        return
    # What came before was settled, or the cycle would not have opened.
    for cycle in facts.recent:
        for window in WINDOWS:
            if facts.window(window, cycle).closed is not None and facts.window(window, cycle).settled is None:
                yield window, cycle


def refuse(window: str, cycle: int, answer: cycle_pb2.Refused) -> Write:
    """Return the fact of a refusal, at its place."""
    return Write(window, cycle, "refused", f"{answer.miner}-{answer.ingress_sequence}", answer)


def settle(facts: RunFacts, reveals: Mapping[int, Fact], window: str, cycle: int) -> list[Write]:
    """Return the facts that settle a window, `settled` last. `reveals` are the run's reveal messages by INGRESS sequence: those
    since the submit window before this one closed, at least, up to this close.
    """
    return _settle_commit(facts, cycle) if window == "commit" else _settle_submit(facts, reveals, cycle)


def _settle_commit(facts: RunFacts, cycle: int) -> list[Write]:
    closed = facts.window("commit", cycle).require_closed()
    writes: list[Write] = []
    committed: list[str] = []
    out = bans.at_close(facts, "commit", cycle)
    for miner, fact in facts.commitments(cycle).items():
        accepted = fact.message
        if miner in out:
            writes.append(_late("commit", facts, cycle, miner, accepted.ingress_sequence, out[miner]))
        elif accepted.ingress_sequence <= closed.last_sequence:
            committed.append(miner)
        else:
            late = judging.late_commitment(cycle)
            writes.append(_late("commit", facts, cycle, miner, accepted.ingress_sequence, late))
    message = _settled(facts, cycle, cycle_pb2.WINDOW_COMMIT, closed.last_sequence)
    message.committed.extend(sorted(committed))
    return [*writes, Write("commit", cycle, "settled", "", message)]


def _settle_submit(facts: RunFacts, reveals: Mapping[int, Fact], cycle: int) -> list[Write]:
    closed = facts.window("submit", cycle).require_closed()
    writes: list[Write] = []
    inside: dict[str, cycle_pb2.Submission] = {}
    out = bans.at_close(facts, "submit", cycle)
    for miner in facts.reveals(cycle):
        own = judging.own_reveal(facts, cycle, miner)
        if own is None:
            continue
        if miner in out:
            writes.append(_late("submit", facts, cycle, miner, own.reveal_sequence, out[miner]))
        elif own.reveal_sequence <= closed.last_sequence:
            inside[miner] = own
        else:
            late = judging.late_reveal(facts, cycle)
            writes.append(_late("submit", facts, cycle, miner, own.reveal_sequence, late))
    rolled = {m: entry for m, entry in _rolled_over(facts, reveals, cycle).items() if m not in inside and m not in out}
    inside |= rolled
    for entry in over_quota(facts, cycle, inside.values()):
        refusal = quota_refusal(facts, cycle)
        writes.append(_late("submit", facts, cycle, entry.miner, entry.reveal_sequence, refusal))
        del inside[entry.miner]
    for miner in sorted(rolled.keys() & inside.keys()):
        accepted = cycle_pb2.RevealAccepted(run=facts.run, cycle=cycle, submission=rolled[miner])
        writes.append(Write("submit", cycle, "accepted", miner, accepted))
    writes.extend(_not_revealed(facts, cycle))
    message = _settled(facts, cycle, cycle_pb2.WINDOW_SUBMIT, closed.last_sequence)
    message.submissions.extend(sorted(inside.values(), key=lambda item: item.commit_sequence))
    return [*writes, Write("submit", cycle, "settled", "", message)]


def _rolled_over(facts: RunFacts, reveals: Mapping[int, Fact], cycle: int) -> dict[str, cycle_pb2.Submission]:
    """Return late reveals of earlier cycles that arrived after the previous submit window closed and before this one
    did.

    Of several by one miner the newest work counts.
    """
    if cycle == 1:
        return {}
    after, until = (facts.window("submit", c).require_closed().last_sequence for c in (cycle - 1, cycle))
    rolled: dict[str, cycle_pb2.Submission] = {}
    inside = [fact for sequence, fact in reveals.items() if after < sequence <= until and 1 <= fact.key.cycle < cycle]
    for fact in sorted(inside, key=lambda fact: (fact.key.cycle, fact.sequence)):
        refusal = facts.window("submit", fact.key.cycle).refusal(fact.signer, fact.sequence)
        if refusal is not None and refusal.reason == reasons_pb2.REASON_LATE_REVEAL:
            rolled[fact.signer] = judging.submission(facts, fact)
    return rolled


def _not_revealed(facts: RunFacts, cycle: int) -> Iterator[Write]:
    """Yield refusals for miners whose commitment stands and who never revealed it."""
    committed = facts.window("commit", cycle).require_settled()
    out = bans.at_close(facts, "submit", cycle)
    spoke = {fact.message.miner for fact in facts.window("submit", cycle).refused.values()}
    for miner in sorted(set(committed.committed) - spoke):
        if judging.own_reveal(facts, cycle, miner) is None:
            silent = Finding(kind=cycle_pb2.FINDING_KIND_NOT_REVEALED, cycle=cycle)
            refusal = out.get(miner) or Refusal(reasons_pb2.REASON_NOT_REVEALED, silent)
            yield _late("submit", facts, cycle, miner, 0, refusal)


def _late(window: str, facts: RunFacts, cycle: int, miner: str, sequence: int, refusal: Refusal) -> Write:
    return refuse(window, cycle, judging.refused_at(window, facts.run, cycle, miner, sequence, refusal))


def _settled(
    facts: RunFacts, cycle: int, window: cycle_pb2.Window.ValueType, last_sequence: int
) -> cycle_pb2.WindowSettled:
    return cycle_pb2.WindowSettled(run=facts.run, cycle=cycle, window=window, last_sequence=last_sequence)
