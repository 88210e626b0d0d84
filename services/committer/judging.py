"""Judgements on commitments and reveals over a run's facts. Pure.

Each returns the fact to write, or None when the message already has its answer. The log may be a moment ahead of the
facts given here, so a refusal is only final when the facts were current (`actions` sees to that).
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.errors import Invalid, NotFound
from connito.protocol import bans
from connito.protocol.claims import most_bytes
from connito.protocol.coding import is_coded
from connito.protocol.commitment import opens
from connito.protocol.findings import Refusal, check_version
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.v1.cycle_pb2 import Finding
from connito.v1.services_pb2 import UploadCommand
from connito.views.sentences import detail_of, sentence
from connito.wire.enums import reason_name
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.locked import is_key, locked_bytes
from connito.wire.private import is_public
from connito.wire.subjects import window_value

DIGEST_BYTES = 32
# Rows are the tensors of the initial state; only the header's metadata may differ in length: by this, and by what is claimed of
# the text. What is coded is shorter.
SIZE_TOLERANCE = 4096


@dataclass(frozen=True)
class CheckContent:
    """A reveal whose artifact's content is still to be checked, by the state that its cycle started from; if it passes,
    `then` is the answer."""

    artifact: ArtifactRef
    base: ArtifactRef
    then: cycle_pb2.RevealAccepted | cycle_pb2.Refused


def known_run(facts: RunFacts | None, run: str) -> RunFacts:
    """Return `facts` if they are of a created run. Raises `NotFound`: an unknown run has no place where a refusal
    could stand.
    """
    if facts is None or facts.spec is None:
        raise unknown(run)
    check_version(facts.spec)
    return facts


def unknown(run: str) -> NotFound:
    """Return the answer about a run that there is not, or that its key has no part in though it is not public."""
    return NotFound(f"no run is called {run!r}; `connito job list` shows them", reason=reasons_pb2.REASON_UNKNOWN_RUN)


def check_shown(facts: RunFacts, miner: str) -> None:
    """Raise `NotFound` for a run that is not public, and that a key has no part in."""
    spec = facts.require_spec()
    if not is_public(spec) and not facts.is_enrolled(miner) and miner not in spec.enrolment.allowed:
        raise unknown(facts.run)


def refused(window: str, fact: Fact, refusal: Refusal) -> cycle_pb2.Refused:
    """Return the fact that tells a miner of the refusal of a message."""
    return refused_at(window, fact.run, fact.key.cycle, fact.signer, fact.sequence, refusal)


def refused_at(window: str, run: str, cycle: int, miner: str, sequence: int, refusal: Refusal) -> cycle_pb2.Refused:
    """Return the fact that tells a miner of the refusal of the message at `sequence`, 0 for one that never came."""
    return cycle_pb2.Refused(
        run=run,
        cycle=cycle,
        window=window_value(window),
        miner=miner,
        reason=refusal.reason,
        finding=refusal.finding,
        ingress_sequence=sequence,
    )


def window_of(fact: Fact) -> str:
    """Return the window that a message is for."""
    return "commit" if fact.key.kind == "commitment" else "submit"


def judge_quota(facts: RunFacts, fact: Fact) -> cycle_pb2.Refused | None:
    """Return the answer to a message beyond the policy's number: a refusal the first time, and then none any more."""
    window, spec = window_of(fact), facts.require_spec()
    if not 1 <= fact.key.cycle <= spec.cycles:
        # Of a cycle that the run does not have there is no next one, and no end of numbers to be refused under.
        return None
    told = facts.window(window, fact.key.cycle).refusals(fact.signer)
    if any(other.reason == reasons_pb2.REASON_QUOTA_EXCEEDED for other in told):
        return None
    kind, limit = cycle_pb2.FINDING_KIND_MESSAGE_QUOTA, spec.enrolment.messages_per_cycle
    finding = Finding(kind=kind, limit=limit, name=fact.key.kind, cycle=fact.key.cycle)
    refusal = Refusal(reasons_pb2.REASON_QUOTA_EXCEEDED, finding)
    return refused(window, fact, refusal)


def judge_commitment(facts: RunFacts, fact: Fact) -> cycle_pb2.CommitmentAccepted | cycle_pb2.Refused | None:
    """Return the answer to a `commitment` message."""
    cycle, miner = fact.key.cycle, fact.signer
    standing = facts.commitment(cycle, miner)
    if _answered(facts, "commit", fact) or (standing is not None and standing.ingress_sequence == fact.sequence):
        return None
    assert isinstance(fact.message, cycle_pb2.Commitment)
    refusal = _barred(facts, miner) or _commit_window(facts, cycle, fact.sequence)
    if refusal is None and standing is not None:
        kind, count = cycle_pb2.FINDING_KIND_COMMITMENT_STANDS, standing.ingress_sequence
        refusal = Refusal(reasons_pb2.REASON_DUPLICATE_COMMITMENT, Finding(kind=kind, count=count, cycle=cycle))
    if refusal is None and len(fact.message.digest) != DIGEST_BYTES:
        kind, count = cycle_pb2.FINDING_KIND_COMMITMENT_LENGTH, len(fact.message.digest)
        finding = Finding(kind=kind, count=count, limit=DIGEST_BYTES, cycle=cycle)
        refusal = Refusal(reasons_pb2.REASON_MALFORMED, finding)
    if refusal is not None:
        return refused("commit", fact, refusal)
    return cycle_pb2.CommitmentAccepted(
        run=fact.run, cycle=cycle, miner=miner, digest=fact.message.digest, ingress_sequence=fact.sequence
    )


def judge_reveal(facts: RunFacts, fact: Fact) -> CheckContent | cycle_pb2.Refused | None:
    """Return the answer to a `reveal` message, as far as it can be given without the artifact."""
    cycle, miner = fact.key.cycle, fact.signer
    own = own_reveal(facts, cycle, miner)
    if _answered(facts, "submit", fact) or (own is not None and own.reveal_sequence == fact.sequence):
        return None
    assert isinstance(fact.message, cycle_pb2.Reveal)
    refusal = _barred(facts, miner) or _submit_window(facts, cycle) or _second_reveal(facts, cycle, miner)
    if refusal is None:
        message = fact.message
        refusal = check_opening(facts, cycle, miner, message.artifact, message.base_state_digest, message.salt)
    if refusal is not None:
        return refused("submit", fact, refusal)
    base = facts.window("train", cycle).require_opened().state
    return CheckContent(fact.message.artifact, base, _conclude(facts, fact))


def check_opening(
    facts: RunFacts, cycle: int, miner: str, artifact: ArtifactRef, base_state_digest: str, salt: bytes
) -> Refusal | None:
    """Return whether these values open the miner's standing commitment of `cycle` to an artifact that may be uploaded."""
    settled = facts.window("commit", cycle).settled
    accepted = facts.commitment(cycle, miner)
    if settled is None or accepted is None or miner not in settled.committed:
        finding = Finding(kind=cycle_pb2.FINDING_KIND_NO_COMMITMENT, cycle=cycle)
        return Refusal(reasons_pb2.REASON_NO_COMMITMENT, finding)
    try:
        fits = opens(accepted.digest, facts.run, cycle, miner, base_state_digest, artifact.digest, salt)
    except Invalid as error:
        return Refusal.of(error)
    if not fits:
        finding = Finding(kind=cycle_pb2.FINDING_KIND_NOT_OPENED, cycle=cycle)
        return Refusal(reasons_pb2.REASON_COMMITMENT_MISMATCH, finding)
    opened = facts.window("train", cycle).require_opened()
    if base_state_digest != opened.state.digest:
        kind, digest = cycle_pb2.FINDING_KIND_OTHER_BASE, opened.state.digest
        finding = Finding(kind=kind, expected=digest, name=base_state_digest, cycle=cycle)
        return Refusal(reasons_pb2.REASON_STALE_BASE, finding)
    return _check_ref(facts, cycle, artifact)


def _check_ref(facts: RunFacts, cycle: int, artifact: ArtifactRef) -> Refusal | None:
    if artifact.realm != REALM_SUBMISSION:
        finding = Finding(kind=cycle_pb2.FINDING_KIND_WRONG_REALM, cycle=cycle)
        return Refusal(reasons_pb2.REASON_MALFORMED, finding)
    spec, selection = facts.require_spec(), facts.require_selection()
    if (artifact.key or artifact.content) and not is_key(artifact):
        return Refusal(reasons_pb2.REASON_MALFORMED, Finding(kind=cycle_pb2.FINDING_KIND_NO_KEY, cycle=cycle))
    expected = selection.initial_state.size
    if artifact.size > locked_bytes(expected + SIZE_TOLERANCE + most_bytes(spec, selection)):
        kind = cycle_pb2.FINDING_KIND_TOO_LARGE
        finding = Finding(kind=kind, count=artifact.size, limit=expected, cycle=cycle)
        return Refusal(reasons_pb2.REASON_OVERSIZED, finding)
    if artifact.size < expected - SIZE_TOLERANCE and not is_coded(spec.training):
        kind = cycle_pb2.FINDING_KIND_TOO_SMALL
        finding = Finding(kind=kind, count=artifact.size, limit=expected, cycle=cycle)
        return Refusal(reasons_pb2.REASON_WRONG_TENSORS, finding)
    return None


def answered(facts: RunFacts, fact: Fact) -> bool:
    """Return whether a commitment or a reveal has its answer."""
    return (judge_commitment if fact.key.kind == "commitment" else judge_reveal)(facts, fact) is None


def judge_upload(facts: RunFacts, miner: str, command: UploadCommand) -> None:
    """Raise `Invalid` unless the miner may upload now what it opens its commitment to, a late one too, or `NotFound`."""
    check_shown(facts, miner)
    cycle = command.cycle
    refusal = _barred(facts, miner) or _submit_window(facts, cycle)
    refusal = refusal or check_opening(facts, cycle, miner, command.artifact, command.base_state_digest, command.salt)
    if refusal is not None:
        raise Invalid(sentence(refusal.finding), reason=refusal.reason)


def own_reveal(facts: RunFacts, cycle: int, miner: str) -> cycle_pb2.Submission | None:
    """Return the accepted submission of a cycle that was made in that cycle, not one that rolled over into it."""
    accepted = facts.reveal(cycle, miner)
    return accepted.submission if accepted is not None and accepted.submission.origin_cycle == cycle else None


def submission(facts: RunFacts, reveal: Fact) -> cycle_pb2.Submission:
    """Return the submission that will be scored if `reveal` is accepted."""
    cycle, miner, message = reveal.key.cycle, reveal.signer, reveal.message
    accepted = facts.commitment(cycle, miner)
    opened = facts.window("train", cycle).require_opened()
    assert isinstance(message, cycle_pb2.Reveal)
    assert accepted is not None
    return cycle_pb2.Submission(
        miner=miner,
        artifact=message.artifact,
        commit_sequence=accepted.ingress_sequence,
        reveal_sequence=reveal.sequence,
        origin_cycle=cycle,
        base_state=opened.state,
    )


def late_reveal(facts: RunFacts, cycle: int) -> Refusal:
    """Return the refusal of a good reveal that missed its window."""
    spec = facts.require_spec()
    last = cycle >= spec.cycles
    kind = cycle_pb2.FINDING_KIND_SUBMIT_CLOSED_FOR_GOOD if last else cycle_pb2.FINDING_KIND_SUBMIT_CLOSED
    return Refusal(reasons_pb2.REASON_LATE_REVEAL, Finding(kind=kind, cycle=cycle))


def late_commitment(cycle: int) -> Refusal:
    """Return the refusal of a commitment that missed its window."""
    finding = Finding(kind=cycle_pb2.FINDING_KIND_COMMIT_CLOSED, cycle=cycle)
    return Refusal(reasons_pb2.REASON_LATE_COMMITMENT, finding)


def describe(answer: cycle_pb2.Refused) -> str:
    """Return one line about a refusal, for the log."""
    return f"{reason_name(answer.reason)}: {detail_of(answer)}"


def _answered(facts: RunFacts, window: str, fact: Fact) -> bool:
    return facts.window(window, fact.key.cycle).refusal(fact.signer, fact.sequence) is not None


def _barred(facts: RunFacts, miner: str) -> Refusal | None:
    ban = bans.standing(facts, miner)
    if ban is not None and not ban.lifted:
        return bans.refusal(ban)
    if not facts.is_enrolled(miner):
        finding = Finding(kind=cycle_pb2.FINDING_KIND_NOT_ENROLLED, name=facts.run)
        return Refusal(reasons_pb2.REASON_NOT_ENROLLED, finding)
    if facts.ended is not None:
        finding = Finding(kind=cycle_pb2.FINDING_KIND_RUN_ENDED, name=facts.run)
        return Refusal(reasons_pb2.REASON_WRONG_WINDOW, finding)
    return None


def _commit_window(facts: RunFacts, cycle: int, sequence: int) -> Refusal | None:
    if facts.window("commit", cycle).opened is None:
        return _not_open(facts, "commit", cycle)
    closed = facts.window("commit", cycle).closed
    if closed is not None and sequence > closed.last_sequence:
        return late_commitment(cycle)
    return None


def _submit_window(facts: RunFacts, cycle: int) -> Refusal | None:
    # The streams are read side by side: what made the window possible may arrive a moment after its opening.
    known = facts.selection is not None and facts.window("train", cycle).opened is not None
    if not known or facts.window("submit", cycle).opened is None:
        return _not_open(facts, "submit", cycle)
    return None


def _not_open(facts: RunFacts, window: str, cycle: int) -> Refusal:
    finding = Finding(kind=cycle_pb2.FINDING_KIND_WINDOW_NOT_OPEN, name=window, cycle=cycle, count=facts.cycle)
    return Refusal(reasons_pb2.REASON_WRONG_WINDOW, finding)


def _second_reveal(facts: RunFacts, cycle: int, miner: str) -> Refusal | None:
    told = facts.window("submit", cycle).refusals(miner)
    late = any(refusal.reason == reasons_pb2.REASON_LATE_REVEAL for refusal in told)
    if not late and own_reveal(facts, cycle, miner) is None:
        return None
    finding = Finding(kind=cycle_pb2.FINDING_KIND_REVEAL_TAKEN, cycle=cycle)
    return Refusal(reasons_pb2.REASON_DUPLICATE_REVEAL, finding)


def _conclude(facts: RunFacts, fact: Fact) -> cycle_pb2.RevealAccepted | cycle_pb2.Refused:
    cycle = fact.key.cycle
    closed = facts.window("submit", cycle).closed
    if closed is not None and fact.sequence > closed.last_sequence:
        return refused("submit", fact, late_reveal(facts, cycle))
    return cycle_pb2.RevealAccepted(run=fact.run, cycle=cycle, submission=submission(facts, fact))
