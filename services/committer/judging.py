"""What a commitment or a reveal is worth: pure judgements over a run's facts.

Each returns the fact to write, or None when the message already has its answer. The log may be a moment ahead of the
facts given here, so a refusal is only final when the facts were current (`actions` sees to that).
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.errors import Invalid, NotFound, reason_name
from connito.protocol import bans
from connito.protocol.commitment import opens
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.v1.services_pb2 import UploadCommand
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import window_value

DIGEST_BYTES = 32
# A submission has the tensors of the initial state; only its header's metadata may differ in length.
SIZE_TOLERANCE = 4096


@dataclass(frozen=True)
class Refusal:
    """Why not, and what to do about it."""

    reason: reasons_pb2.Reason.ValueType
    detail: str


@dataclass(frozen=True)
class CheckContent:
    """Everything but the artifact's content is in order; when that is too, `then` is the answer."""

    artifact: ArtifactRef
    then: cycle_pb2.RevealAccepted | cycle_pb2.Refused


def known_run(facts: RunFacts | None, run: str) -> RunFacts:
    """`facts` if they are of a created run. Raises `NotFound`: an unknown run has no place where a refusal could stand."""
    if facts is None or facts.spec is None:
        raise NotFound(
            f"no run is called {run!r}; `connito job list` shows them", reason=reasons_pb2.REASON_UNKNOWN_RUN
        )
    return facts


def refused(window: str, fact: Fact, refusal: Refusal) -> cycle_pb2.Refused:
    """The fact that tells a miner of a refusal."""
    return cycle_pb2.Refused(
        run=fact.run,
        cycle=fact.key.cycle,
        window=window_value(window),
        miner=fact.signer,
        reason=refusal.reason,
        detail=refusal.detail,
        ingress_sequence=fact.sequence,
    )


def window_of(fact: Fact) -> str:
    """The window that a message is for."""
    return "commit" if fact.key.kind == "commitment" else "submit"


def judge_quota(facts: RunFacts, fact: Fact) -> cycle_pb2.Refused | None:
    """The answer to a message beyond the policy's number: a refusal the first time, and then none any more."""
    window, spec = window_of(fact), facts.spec
    assert spec is not None
    if not 1 <= fact.key.cycle <= spec.cycles:
        # Of a cycle that the run does not have there is no next one, and no end of numbers to be refused under.
        return None
    for other in facts.window(window, fact.key.cycle).refused.values():
        if (other.message.miner, other.message.reason) == (fact.signer, reasons_pb2.REASON_QUOTA_EXCEEDED):
            return None
    refusal = Refusal(
        reasons_pb2.REASON_QUOTA_EXCEEDED,
        f"more than {spec.enrolment.messages_per_cycle} {fact.key.kind} messages in cycle {fact.key.cycle}; further "
        "ones are dropped without an answer, try again in the next cycle",
    )
    return refused(window, fact, refusal)


def judge_commitment(facts: RunFacts, fact: Fact) -> cycle_pb2.CommitmentAccepted | cycle_pb2.Refused | None:
    """The answer to a `commitment` message."""
    cycle, miner = fact.key.cycle, fact.signer
    standing = facts.commitment(cycle, miner)
    if _answered(facts, "commit", fact) or (standing is not None and standing.ingress_sequence == fact.sequence):
        return None
    assert isinstance(fact.message, cycle_pb2.Commitment)
    refusal = _barred(facts, miner) or _commit_window(facts, cycle, fact.sequence)
    if refusal is None and standing is not None:
        refusal = Refusal(
            reasons_pb2.REASON_DUPLICATE_COMMITMENT,
            f"your commitment at {standing.ingress_sequence} stands for cycle {cycle}; reveal that one",
        )
    if refusal is None and len(fact.message.digest) != DIGEST_BYTES:
        refusal = Refusal(
            reasons_pb2.REASON_MALFORMED,
            f"a commitment is {DIGEST_BYTES} bytes, this one has {len(fact.message.digest)}; send the SHA-256 digest",
        )
    if refusal is not None:
        return refused("commit", fact, refusal)
    return cycle_pb2.CommitmentAccepted(
        run=fact.run, cycle=cycle, miner=miner, digest=fact.message.digest, ingress_sequence=fact.sequence
    )


def judge_reveal(facts: RunFacts, fact: Fact) -> CheckContent | cycle_pb2.Refused | None:
    """The answer to a `reveal` message, as far as it can be given without the artifact."""
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
    return CheckContent(fact.message.artifact, _conclude(facts, fact))


def check_opening(
    facts: RunFacts, cycle: int, miner: str, artifact: ArtifactRef, base_state_digest: str, salt: bytes
) -> Refusal | None:
    """Whether these values open the miner's standing commitment of `cycle` to an artifact that may be uploaded."""
    settled = facts.window("commit", cycle).settled
    accepted = facts.commitment(cycle, miner)
    if settled is None or accepted is None or miner not in settled.committed:
        return Refusal(
            reasons_pb2.REASON_NO_COMMITMENT,
            f"no commitment of yours stands for cycle {cycle}; commit in time in a later cycle",
        )
    try:
        fits = opens(accepted.digest, facts.run, cycle, miner, base_state_digest, artifact.digest, salt)
    except Invalid as error:
        return Refusal(error.reason, str(error))
    if not fits:
        return Refusal(
            reasons_pb2.REASON_COMMITMENT_MISMATCH,
            "artifact, base state and salt do not open your commitment; reveal exactly what you committed to",
        )
    opened = facts.window("train", cycle).opened
    assert opened is not None, "a commitment stands in a cycle that was opened"
    if base_state_digest != opened.state.digest:
        return Refusal(
            reasons_pb2.REASON_STALE_BASE,
            f"cycle {cycle} starts from state {opened.state.digest[:12]}…, you trained from {base_state_digest[:12]}…; "
            "fetch the state that train.opened names",
        )
    return _check_ref(facts, artifact)


def _check_ref(facts: RunFacts, artifact: ArtifactRef) -> Refusal | None:
    if artifact.realm != REALM_SUBMISSION:
        return Refusal(reasons_pb2.REASON_MALFORMED, "a submission is uploaded to, and named in, REALM_SUBMISSION")
    selection = facts.selection
    assert selection is not None, "cycles are opened after the selection"
    expected = selection.initial_state.size
    if artifact.size > expected + SIZE_TOLERANCE:
        return Refusal(
            reasons_pb2.REASON_OVERSIZED,
            f"{artifact.size} bytes, but the selected experts take {expected}; upload only their tensors",
        )
    if artifact.size < expected - SIZE_TOLERANCE:
        return Refusal(
            reasons_pb2.REASON_WRONG_TENSORS,
            f"{artifact.size} bytes cannot hold the selected experts ({expected}); upload all tensors, unquantised",
        )
    return None


def judge_upload(facts: RunFacts, miner: str, command: UploadCommand) -> None:
    """Raise `Invalid` unless the miner may upload now what it opens its commitment to. A late upload still may."""
    cycle = command.cycle
    refusal = _barred(facts, miner) or _submit_window(facts, cycle)
    refusal = refusal or check_opening(facts, cycle, miner, command.artifact, command.base_state_digest, command.salt)
    if refusal is not None:
        raise Invalid(refusal.detail, reason=refusal.reason)


def own_reveal(facts: RunFacts, cycle: int, miner: str) -> cycle_pb2.Submission | None:
    """The accepted submission of a cycle that was made in that cycle, not one that rolled over into it."""
    accepted = facts.reveal(cycle, miner)
    return accepted.submission if accepted is not None and accepted.submission.origin_cycle == cycle else None


def submission(facts: RunFacts, reveal: Fact) -> cycle_pb2.Submission:
    """What will be scored when `reveal` is taken."""
    cycle, miner, message = reveal.key.cycle, reveal.signer, reveal.message
    accepted = facts.commitment(cycle, miner)
    opened = facts.window("train", cycle).opened
    assert isinstance(message, cycle_pb2.Reveal)
    assert accepted is not None
    assert opened is not None
    return cycle_pb2.Submission(
        miner=miner,
        artifact=message.artifact,
        commit_sequence=accepted.ingress_sequence,
        reveal_sequence=reveal.sequence,
        origin_cycle=cycle,
        base_state=opened.state,
    )


def late_reveal(facts: RunFacts, cycle: int) -> Refusal:
    """The refusal of a good reveal that missed its window."""
    spec = facts.spec
    assert spec is not None
    what = f"the submit window of cycle {cycle} is closed"
    if cycle >= spec.cycles:
        return Refusal(reasons_pb2.REASON_LATE_REVEAL, f"{what} and it was the last cycle")
    return Refusal(
        reasons_pb2.REASON_LATE_REVEAL,
        f"{what}; your work rolls over and is scored in the next open cycle, unless you reveal newer work there",
    )


def late_commitment(cycle: int) -> Refusal:
    """The refusal of a commitment that missed its window."""
    return Refusal(
        reasons_pb2.REASON_LATE_COMMITMENT,
        f"the commit window of cycle {cycle} is closed; train on the next cycle's state and commit there",
    )


def describe(answer: cycle_pb2.Refused) -> str:
    """One line about a refusal, for the log."""
    return f"{reason_name(answer.reason)}: {answer.detail}"


def _answered(facts: RunFacts, window: str, fact: Fact) -> bool:
    return f"{fact.signer}-{fact.sequence}" in facts.window(window, fact.key.cycle).refused


def _barred(facts: RunFacts, miner: str) -> Refusal | None:
    ban = bans.standing(facts, miner)
    if ban is not None and not ban.lifted:
        return Refusal(reasons_pb2.REASON_BANNED, bans.why(ban))
    if miner not in facts.enrolled:
        return Refusal(
            reasons_pb2.REASON_NOT_ENROLLED, f"you are not enrolled in run {facts.run}; `connito miner run` enrols you"
        )
    if facts.ended is not None:
        return Refusal(reasons_pb2.REASON_WRONG_WINDOW, f"run {facts.run} has ended; nothing is accepted any more")
    return None


def _commit_window(facts: RunFacts, cycle: int, sequence: int) -> Refusal | None:
    if facts.window("commit", cycle).opened is None:
        return Refusal(
            reasons_pb2.REASON_WRONG_WINDOW,
            f"the commit window of cycle {cycle} is not open (the run is in cycle {facts.cycle}); "
            "commit after commit.opened",
        )
    closed = facts.window("commit", cycle).closed
    if closed is not None and sequence > closed.last_sequence:
        return late_commitment(cycle)
    return None


def _submit_window(facts: RunFacts, cycle: int) -> Refusal | None:
    # The streams are read side by side: what made the window possible may arrive a moment after its opening.
    known = facts.selection is not None and facts.window("train", cycle).opened is not None
    if not known or facts.window("submit", cycle).opened is None:
        return Refusal(
            reasons_pb2.REASON_WRONG_WINDOW,
            f"the submit window of cycle {cycle} is not open (the run is in cycle {facts.cycle}); "
            "upload and reveal after submit.opened",
        )
    return None


def _second_reveal(facts: RunFacts, cycle: int, miner: str) -> Refusal | None:
    late = any(
        isinstance(fact.message, cycle_pb2.Refused)
        and fact.message.miner == miner
        and fact.message.reason == reasons_pb2.REASON_LATE_REVEAL
        for fact in facts.window("submit", cycle).refused.values()
    )
    if not late and own_reveal(facts, cycle, miner) is None:
        return None
    return Refusal(reasons_pb2.REASON_DUPLICATE_REVEAL, f"your reveal for cycle {cycle} was already taken")


def _conclude(facts: RunFacts, fact: Fact) -> cycle_pb2.RevealAccepted | cycle_pb2.Refused:
    cycle = fact.key.cycle
    closed = facts.window("submit", cycle).closed
    if closed is not None and fact.sequence > closed.last_sequence:
        return refused("submit", fact, late_reveal(facts, cycle))
    return cycle_pb2.RevealAccepted(run=fact.run, cycle=cycle, submission=submission(facts, fact))
