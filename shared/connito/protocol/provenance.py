"""Checks that facts of coordinator and committer follow from their own earlier facts. Pure.

The aggregator and a miner work on a state and on submissions that somebody else named. Each of them looks, where it uses
them, whether these agree with the rest of the log as far as it has read it: a signature says who is
responsible for a claim, and not that it is true. What has not been read yet is not held against anybody; an auditor has
everything.
"""

from __future__ import annotations

from collections.abc import Iterator

from connito.errors import VerificationFailed
from connito.v1 import cycle_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key


def check_start(facts: RunFacts, cycle: int) -> None:
    """Raise `VerificationFailed` when a cycle starts from another state than the one before has published."""
    opened, before, selection = facts.window("train", cycle).opened, facts.version(cycle - 1), facts.selection
    if opened is None:
        return
    if before is not None:
        expected, version = before.state, before.version
    elif cycle == 1 and selection is not None:
        expected, version = selection.initial_state, 0
    else:
        return
    if (opened.state.digest, opened.version) != (expected.digest, version):
        raise VerificationFailed(
            f"cycle {cycle} was opened on version {opened.version} ({opened.state.digest[:12]}…); what was published is "
            f"version {version} ({expected.digest[:12]}…): the coordinator or the log is wrong, audit the run"
        )


def check_settled(facts: RunFacts, cycle: int) -> None:
    """Raise `VerificationFailed` when the settled submissions of a cycle contradict what was committed and accepted."""
    settled = facts.window("submit", cycle).settled
    fault = "" if settled is None else next(_faults(facts, cycle, settled), "")
    if fault:
        raise VerificationFailed(
            f"the submissions settled for cycle {cycle} contradict the log: {fault}; the committer or the log is wrong, "
            "audit the run"
        )


def _faults(facts: RunFacts, cycle: int, settled: cycle_pb2.WindowSettled) -> Iterator[str]:
    closed = facts.window("submit", cycle).closed
    if closed is not None and settled.last_sequence != closed.last_sequence:
        yield f"settled up to {settled.last_sequence}, closed at {closed.last_sequence}"
    if len({entry.miner for entry in settled.submissions}) != len(settled.submissions):
        yield "a miner is in it twice"
    out = set() if closed is None else set(closed.banned)
    for entry in settled.submissions:
        who = short_key(entry.miner)
        if entry.miner in out:
            yield f"{who} is banned by then"
        if closed is not None and entry.reveal_sequence > closed.last_sequence:
            yield f"{who} revealed at {entry.reveal_sequence}, after the close"
        if entry.artifact.realm != REALM_SUBMISSION:
            yield f"{who} names an artifact that is no submission"
        if not 1 <= entry.origin_cycle <= cycle:
            yield f"{who} worked in cycle {entry.origin_cycle}"
        yield from (f"{who} {what}" for what in _against_origin(facts, entry))


def _against_origin(facts: RunFacts, entry: cycle_pb2.Submission) -> Iterator[str]:
    origin = entry.origin_cycle
    accepted = facts.commitment(origin, entry.miner)
    opened, closed = facts.window("train", origin).opened, facts.window("commit", origin).closed
    committed = facts.window("commit", origin).settled
    if accepted is not None and accepted.ingress_sequence != entry.commit_sequence:
        yield f"committed at {accepted.ingress_sequence}, not at {entry.commit_sequence}"
    if committed is not None and entry.miner not in committed.committed:
        yield f"has no commitment that stands in cycle {origin}"
    if closed is not None and entry.commit_sequence > closed.last_sequence:
        yield f"committed at {entry.commit_sequence}, after the close of cycle {origin}"
    if opened is not None and entry.base_state.digest not in ("", opened.state.digest):
        yield f"is said to have started from {entry.base_state.digest[:12]}…, not from cycle {origin}'s state"
