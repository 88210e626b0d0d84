"""Checks of the committer's answers to miners: commitments, reveals, refusals, membership. Pure.

Membership is by sequence alone; commitments open to what was revealed, by whoever made them; a refusal names a reason
that the log bears out; and nothing that lay inside of a window went without an answer.
"""

from __future__ import annotations

from collections.abc import Iterator

from connito.audit.differences import Difference, Step, first_difference
from connito.audit.evidence import Evidence
from connito.errors import Invalid
from connito.protocol.bans import at_close
from connito.protocol.commitment import opens
from connito.protocol.quota import MessageCounter
from connito.protocol.scoring.newcomers import over_quota
from connito.v1 import cycle_pb2, reasons_pb2
from connito.wire.enums import name_of, reason_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.subjects import window_value

_LATE = (reasons_pb2.REASON_LATE_COMMITMENT, reasons_pb2.REASON_LATE_REVEAL)
_EARLY = (
    reasons_pb2.REASON_WRONG_WINDOW,
    reasons_pb2.REASON_NOT_ENROLLED,
    reasons_pb2.REASON_MALFORMED,
    reasons_pb2.REASON_BANNED,
)
_KIND = {"commit": "commitment", "submit": "reveal"}


def commitments(evidence: Evidence, cycle: int) -> Step:
    """Check the commit window: accepted commitments were sent first, in time, by enrolled miners; and its settlement."""
    facts = evidence.facts
    found = [*_accepted_commitments(evidence, cycle), *_refusals(evidence, "commit", cycle)]
    found += [*_unanswered(evidence, "commit", cycle), *_settled_commit(evidence, cycle)]
    compared = len(facts.commitments(cycle)) + len(facts.window("commit", cycle).refused)
    return Step("commitments", cycle, compared, tuple(found))


def _accepted_commitments(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    for miner, fact in evidence.facts.commitments(cycle).items():
        accepted = fact.message
        where = evidence.subject("commit", cycle, "accepted", miner)

        def wrong(what: str, where: str = where, miner: str = miner) -> Difference:
            return Difference("commitments", where, what, cycle, miner)

        said = _said(evidence, accepted.ingress_sequence, "commitment", miner, cycle)
        if said is None:
            yield wrong(f"INGRESS {accepted.ingress_sequence} holds no valid commitment of this miner")
            continue
        assert isinstance(said.message, cycle_pb2.Commitment)
        if said.message.digest != accepted.digest:
            yield wrong(f"{said.message.digest.hex()} was said, {accepted.digest.hex()} is recorded")
        if miner not in evidence.facts.miners:
            yield wrong("the miner is not enrolled")
        yield from (wrong(what) for what in _overtaken(evidence, said))


def _overtaken(evidence: Evidence, accepted: Fact) -> Iterator[str]:
    """Yield earlier valid commitments of the same miner that were refused."""
    cycle, miner = accepted.key.cycle, accepted.signer
    for sequence, said in evidence.said.items():
        same = (said.key.kind, said.key.cycle, said.signer) == ("commitment", cycle, miner)
        if not same or sequence >= accepted.sequence:
            continue
        refused = evidence.facts.window("commit", cycle).refusal(miner, sequence)
        if refused is None or refused.reason not in _EARLY:
            yield f"the earlier one at INGRESS {sequence} should stand"


def _settled_commit(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    facts = evidence.facts
    settled, closed = facts.window("commit", cycle).settled, facts.window("commit", cycle).closed
    if settled is None or closed is None:
        return
    out = at_close(facts, "commit", cycle)
    inside = [
        miner
        for miner, fact in facts.commitments(cycle).items()
        if miner not in out and fact.message.ingress_sequence <= closed.last_sequence
    ]
    expected = cycle_pb2.WindowSettled(
        run=facts.run,
        cycle=cycle,
        window=cycle_pb2.WINDOW_COMMIT,
        last_sequence=closed.last_sequence,
        committed=sorted(inside),
    )
    what = first_difference(expected, settled)
    if what:
        yield Difference("commitments", evidence.subject("commit", cycle, "settled"), what, cycle)


def submissions(evidence: Evidence, cycle: int) -> Step:
    """Check the submit window: accepted reveals open their commitments, in time, and the settlement lists just those."""
    facts = evidence.facts
    found = [*_accepted_reveals(evidence, cycle), *_refusals(evidence, "submit", cycle)]
    found += [*_unanswered(evidence, "submit", cycle), *_settled_submit(evidence, cycle)]
    compared = len(facts.reveals(cycle)) + len(facts.window("submit", cycle).refused)
    return Step("submissions", cycle, compared, tuple(found))


def _accepted_reveals(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    for miner, fact in evidence.facts.reveals(cycle).items():
        what = opening_fault(evidence, fact.message.submission)
        if what:
            where = evidence.subject("submit", cycle, "accepted", miner)
            yield Difference("submissions", where, what, cycle, miner)


def opening_fault(evidence: Evidence, submission: cycle_pb2.Submission) -> str:
    """Return why an accepted submission is not what its miner committed to and revealed; empty when it is."""
    facts, miner, origin = evidence.facts, submission.miner, submission.origin_cycle
    said = _said(evidence, submission.reveal_sequence, "reveal", miner, origin)
    if said is None:
        return f"INGRESS {submission.reveal_sequence} holds no valid reveal of this miner for cycle {origin}"
    accepted = facts.commitment(origin, miner)
    settled, opened = facts.window("commit", origin).settled, facts.window("train", origin).opened
    if accepted is None or settled is None or opened is None or miner not in settled.committed:
        return f"no commitment of this miner stands in cycle {origin}"
    expected = _submission(said, accepted, opened)
    what = first_difference(expected, submission)
    if what:
        return what
    return "" if _opens(said, accepted) else "what was revealed does not open the commitment"


def _submission(
    said: Fact, accepted: cycle_pb2.CommitmentAccepted, opened: cycle_pb2.WindowOpened
) -> cycle_pb2.Submission:
    assert isinstance(said.message, cycle_pb2.Reveal)
    return cycle_pb2.Submission(
        miner=said.signer,
        artifact=said.message.artifact,
        commit_sequence=accepted.ingress_sequence,
        reveal_sequence=said.sequence,
        origin_cycle=said.key.cycle,
        base_state=opened.state,
    )


def _opens(said: Fact, accepted: cycle_pb2.CommitmentAccepted) -> bool:
    message = said.message
    assert isinstance(message, cycle_pb2.Reveal)
    digest, base = message.artifact.digest, message.base_state_digest
    try:
        return opens(accepted.digest, said.run, said.key.cycle, said.signer, base, digest, message.salt)
    except Invalid:
        return False


def _settled_submit(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    facts = evidence.facts
    settled, closed = facts.window("submit", cycle).settled, facts.window("submit", cycle).closed
    if settled is None or closed is None:
        return
    inside = _inside(evidence, cycle, closed.last_sequence)
    for entry in over_quota(facts, cycle, inside.values()):
        del inside[entry.miner]
        if facts.window("submit", cycle).refusal(entry.miner, entry.reveal_sequence) is None:
            where = evidence.subject("submit", cycle, "settled")
            yield Difference("submissions", where, "a newcomer beyond the quota was not told", cycle, entry.miner)
    expected = cycle_pb2.WindowSettled(
        run=facts.run,
        cycle=cycle,
        window=cycle_pb2.WINDOW_SUBMIT,
        last_sequence=closed.last_sequence,
        submissions=sorted(inside.values(), key=lambda entry: entry.commit_sequence),
    )
    what = first_difference(expected, settled)
    if what:
        yield Difference("submissions", evidence.subject("submit", cycle, "settled"), what, cycle)


def _inside(evidence: Evidence, cycle: int, last: int) -> dict[str, cycle_pb2.Submission]:
    """Return each miner's submission inside a submit window, or rolled over into it; banned miners have none."""
    out = at_close(evidence.facts, "submit", cycle)
    inside: dict[str, cycle_pb2.Submission] = {}
    for miner, fact in evidence.facts.reveals(cycle).items():
        entry = fact.message.submission
        if entry.origin_cycle == cycle and entry.reveal_sequence <= last:
            inside[miner] = entry
    inside = {**_rolled_over(evidence, cycle, last), **inside}
    return {miner: entry for miner, entry in inside.items() if miner not in out}


def _rolled_over(evidence: Evidence, cycle: int, until: int) -> dict[str, cycle_pb2.Submission]:
    """Return late reveals of earlier cycles that came after the previous submit window and before this one ended.

    Of several by one miner the newest work counts.
    """
    facts, rolled = evidence.facts, {}
    before = facts.window("submit", cycle - 1).closed
    for origin in range(1, cycle if before is not None else 1):
        for fact in facts.window("submit", origin).refused.values():
            refused = fact.message
            assert before is not None
            inside = before.last_sequence < refused.ingress_sequence <= until
            if refused.reason != reasons_pb2.REASON_LATE_REVEAL or not inside:
                continue
            said = _said(evidence, refused.ingress_sequence, "reveal", refused.miner, origin)
            accepted = facts.commitment(origin, refused.miner)
            opened = facts.window("train", origin).opened
            if said is not None and accepted is not None and opened is not None:
                rolled[refused.miner] = _submission(said, accepted, opened)
    return rolled


def _refusals(evidence: Evidence, window: str, cycle: int) -> Iterator[Difference]:
    for id_, fact in evidence.facts.window(window, cycle).refused.items():
        refused = fact.message
        what = refusal_fault(evidence, window, refused)
        if what:
            where = evidence.subject(window, cycle, "refused", id_)
            check = "commitments" if window == "commit" else "submissions"
            yield Difference(check, where, what, cycle, refused.miner)


def refusal_fault(evidence: Evidence, window: str, refused: cycle_pb2.Refused) -> str:
    """Return why a refusal is not justified; empty when the log confirms it. Contents of artifacts are checked elsewhere."""
    facts, cycle, miner, sequence = evidence.facts, refused.cycle, refused.miner, refused.ingress_sequence
    name = reason_name(refused.reason)
    if refused.window != window_value(window):
        return f"speaks of {name_of(cycle_pb2.Window, refused.window)}"
    if refused.reason == reasons_pb2.REASON_BANNED:
        return "" if _ever_banned(facts, miner) else f"refused as {name}, but no ban of this key is in the log"
    if refused.reason == reasons_pb2.REASON_NOT_REVEALED:
        own = _own(facts, cycle, miner)
        closed = facts.window(window, cycle).closed
        inside = own is not None and closed is not None and own.reveal_sequence <= closed.last_sequence
        return "the miner's reveal was accepted" if inside else ""
    if refused.reason == reasons_pb2.REASON_NEWCOMER_QUOTA:
        return _quota_fault(evidence, cycle, miner, sequence)
    said = _said(evidence, sequence, _KIND[window], miner, cycle)
    if said is None:
        return f"INGRESS {sequence} holds no valid {_KIND[window]} of this miner for cycle {cycle}"
    closed = facts.window(window, cycle).closed
    late = closed is not None and sequence > closed.last_sequence
    if refused.reason in _LATE and not late:
        return f"refused as {name}, but INGRESS {sequence} lies inside the window"
    if refused.reason == reasons_pb2.REASON_QUOTA_EXCEEDED and not _over(evidence, said):
        return f"refused as {name}, but the policy answers this many"
    if refused.reason == reasons_pb2.REASON_UNSPECIFIED:
        return "a refusal names its reason, this one does not"
    return _against_commitment(facts, refused, said, name)


def _quota_fault(evidence: Evidence, cycle: int, miner: str, sequence: int) -> str:
    closed = evidence.facts.window("submit", cycle).closed
    inside = _inside(evidence, cycle, closed.last_sequence) if closed is not None else {}
    beyond = [(entry.miner, entry.reveal_sequence) for entry in over_quota(evidence.facts, cycle, inside.values())]
    return "" if (miner, sequence) in beyond else "refused as newcomer-quota, but the quota had a place for this miner"


def _ever_banned(facts: RunFacts, miner: str) -> bool:
    """Return whether a ban justifies a refusal: possible once it is known; whether it counts is settled at the close."""
    return any(fact.message.miner == miner and not fact.message.lifted for fact in facts.bans.values())


def _against_commitment(facts: RunFacts, refused: cycle_pb2.Refused, said: Fact, name: str) -> str:
    cycle, miner = refused.cycle, refused.miner
    accepted = facts.commitment(cycle, miner)
    opened = facts.window("train", cycle).opened
    if refused.reason == reasons_pb2.REASON_DUPLICATE_COMMITMENT:
        first = accepted is not None and accepted.ingress_sequence < refused.ingress_sequence
        return "" if first else f"refused as {name}, but no earlier commitment stands"
    if accepted is None or not isinstance(said.message, cycle_pb2.Reveal):
        return ""
    if refused.reason == reasons_pb2.REASON_COMMITMENT_MISMATCH and _opens(said, accepted):
        return f"refused as {name}, but it opens the commitment"
    stale = opened is None or said.message.base_state_digest != opened.state.digest
    if refused.reason == reasons_pb2.REASON_STALE_BASE and not stale:
        return f"refused as {name}, but it started from the cycle's state"
    return ""


def _unanswered(evidence: Evidence, window: str, cycle: int) -> Iterator[Difference]:
    """Yield messages inside of a settled window that were neither accepted nor refused."""
    facts = evidence.facts
    closed = facts.window(window, cycle).closed
    if closed is None or facts.window(window, cycle).settled is None:
        return
    for sequence, said in evidence.said.items():
        if (said.key.kind, said.key.cycle) != (_KIND[window], cycle) or sequence > closed.last_sequence:
            continue
        if _dropped(evidence, window, said):
            continue
        taken = _taken_sequence(facts, window, cycle, said.signer)
        if sequence != taken and facts.window(window, cycle).refusal(said.signer, sequence) is None:
            where = f"ingress.{short_key(said.signer)}.{said.key.kind} (INGRESS {sequence})"
            check = "commitments" if window == "commit" else "submissions"
            what = f"lies inside the {window} window and was never answered"
            yield Difference(check, where, what, cycle, said.signer)


def _over(evidence: Evidence, said: Fact) -> bool:
    """Return whether a message is beyond the number that the run's policy answers one by one."""
    counted = MessageCounter()
    for _, earlier in sorted(evidence.said.items()):
        if earlier.key.kind == said.key.kind and earlier.signer == said.signer:
            counted.add(earlier)
    return evidence.facts.spec is not None and counted.over(said, evidence.facts.spec)


def _dropped(evidence: Evidence, window: str, said: Fact) -> bool:
    """Return whether a message may go without an answer: it is beyond the quota, and its miner was told so."""
    told = any(
        fact.message.miner == said.signer and fact.message.reason == reasons_pb2.REASON_QUOTA_EXCEEDED
        for fact in evidence.facts.window(window, said.key.cycle).refused.values()
    )
    return told and _over(evidence, said)


def _taken_sequence(facts: RunFacts, window: str, cycle: int, miner: str) -> int:
    if window == "submit":
        own = _own(facts, cycle, miner)
        return 0 if own is None else own.reveal_sequence
    accepted = facts.commitment(cycle, miner)
    return 0 if accepted is None else accepted.ingress_sequence


def _own(facts: RunFacts, cycle: int, miner: str) -> cycle_pb2.Submission | None:
    accepted = facts.reveal(cycle, miner)
    own = accepted is not None and accepted.submission.origin_cycle == cycle
    return accepted.submission if accepted is not None and own else None


def _said(evidence: Evidence, sequence: int, kind: str, miner: str, cycle: int) -> Fact | None:
    said = evidence.said.get(sequence)
    fits = said is not None and (said.key.kind, said.signer, said.key.cycle) == (kind, miner, cycle)
    return said if fits else None
