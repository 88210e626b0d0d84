"""Every reason for which a commitment, a reveal or an upload is refused, and that the others are not."""

from __future__ import annotations

import json

import pytest
from connito.errors import Invalid, NotFound
from connito.protocol.claims import metadata_of
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.v1.services_pb2 import UploadCommand
from connito.views.sentences import detail_of
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.locked import locked_bytes

from services.committer import settlement
from services.committer.judging import (
    SIZE_TOLERANCE,
    CheckContent,
    judge_commitment,
    judge_reveal,
    judge_upload,
    known_run,
)
from tests.unit.services.committer.ledger import RUN, SALT, SIZE, Ledger, artifact, opening, theta


@pytest.fixture
def ledger() -> Ledger:
    """Two miners are enrolled, the commit window of cycle 1 is open."""
    ledger = Ledger()
    ledger.miners("ma", "mb")
    ledger.opened("train", 1)
    ledger.opened("commit", 1)
    return ledger


def commit(ledger: Ledger, said: Fact) -> cycle_pb2.CommitmentAccepted | cycle_pb2.Refused | None:
    """Judge a commitment and write the answer down."""
    answer = judge_commitment(ledger.facts, said)
    if isinstance(answer, cycle_pb2.CommitmentAccepted):
        ledger.publish("commit", answer.cycle, "accepted", answer, answer.miner)
    elif answer is not None:
        ledger.publish("commit", answer.cycle, "refused", answer, f"{answer.miner}-{answer.ingress_sequence}")
    return answer


def reveal(ledger: Ledger, said: Fact) -> cycle_pb2.RevealAccepted | cycle_pb2.Refused | None:
    """Judge a reveal whose artifact is good, and write the answer down."""
    judged = judge_reveal(ledger.facts, said)
    answer = judged.then if isinstance(judged, CheckContent) else judged
    if isinstance(answer, cycle_pb2.RevealAccepted):
        ledger.publish("submit", answer.cycle, "accepted", answer, answer.submission.miner)
    elif answer is not None:
        ledger.publish("submit", answer.cycle, "refused", answer, f"{answer.miner}-{answer.ingress_sequence}")
    return answer


def settle(ledger: Ledger, window: str, cycle: int) -> cycle_pb2.WindowSettled:
    for write in settlement.settle(ledger.facts, ledger.reveals, window, cycle):
        ledger.publish(write.section, write.cycle, write.kind, write.message, write.id)
    settled = ledger.facts.window(window, cycle).settled
    assert settled is not None
    return settled


def to_submit(ledger: Ledger, cycle: int = 1, miners: tuple[str, ...] = ("ma", "mb")) -> None:
    """Everyone commits; the submit window of `cycle` is open."""
    ledger.opened("train", cycle)
    ledger.opened("commit", cycle)
    for miner in miners:
        commit(ledger, ledger.commitment(miner, cycle))
    ledger.closed("commit", cycle)
    settle(ledger, "commit", cycle)
    ledger.opened("submit", cycle)


def reason(answer: object) -> int:
    assert isinstance(answer, cycle_pb2.Refused)
    assert detail_of(answer), "a refusal says what to do"
    return answer.reason


# Commitments.


def test_a_commitment_in_the_open_window_is_accepted_with_its_place_in_the_log(ledger: Ledger) -> None:
    said = ledger.commitment("ma", 1)
    assert commit(ledger, said) == cycle_pb2.CommitmentAccepted(
        run=RUN, cycle=1, miner="ma", digest=opening("ma", 1), ingress_sequence=said.sequence
    )


def test_the_same_message_again_needs_no_second_answer(ledger: Ledger) -> None:
    said = ledger.commitment("ma", 1)
    commit(ledger, said)
    assert judge_commitment(ledger.facts, said) is None
    second = ledger.commitment("ma", 1, b"x" * 32)
    commit(ledger, second)
    assert judge_commitment(ledger.facts, second) is None


def test_the_first_commitment_stands(ledger: Ledger) -> None:
    commit(ledger, ledger.commitment("ma", 1))
    assert reason(commit(ledger, ledger.commitment("ma", 1, b"x" * 32))) == reasons_pb2.REASON_DUPLICATE_COMMITMENT


def test_a_refused_commitment_does_not_bar_a_good_one(ledger: Ledger) -> None:
    assert reason(commit(ledger, ledger.commitment("ma", 1, b"short"))) == reasons_pb2.REASON_MALFORMED
    assert isinstance(commit(ledger, ledger.commitment("ma", 1)), cycle_pb2.CommitmentAccepted)


def test_only_the_enrolled_commit(ledger: Ledger) -> None:
    assert reason(commit(ledger, ledger.commitment("stranger", 1))) == reasons_pb2.REASON_NOT_ENROLLED


@pytest.mark.parametrize("cycle", [0, 2, 4_000_000_000])
def test_a_commitment_to_a_cycle_that_is_not_committing_is_refused(ledger: Ledger, cycle: int) -> None:
    assert reason(commit(ledger, ledger.commitment("ma", cycle))) == reasons_pb2.REASON_WRONG_WINDOW


def test_a_commitment_during_train_is_too_early() -> None:
    ledger = Ledger()
    ledger.miners("ma")
    ledger.opened("train", 1)
    assert reason(commit(ledger, ledger.commitment("ma", 1))) == reasons_pb2.REASON_WRONG_WINDOW


def test_late_is_decided_by_sequence_and_not_by_when_it_is_handled(ledger: Ledger) -> None:
    in_time = ledger.commitment("ma", 1)
    ledger.closed("commit", 1)
    late = ledger.commitment("mb", 1)
    assert isinstance(commit(ledger, in_time), cycle_pb2.CommitmentAccepted)
    assert reason(commit(ledger, late)) == reasons_pb2.REASON_LATE_COMMITMENT


def test_nothing_is_accepted_after_the_end(ledger: Ledger) -> None:
    ledger.ended()
    assert reason(commit(ledger, ledger.commitment("ma", 1))) == reasons_pb2.REASON_WRONG_WINDOW


def test_an_unknown_run_has_no_place_for_an_answer() -> None:
    for facts in (None, RunFacts("nowhere")):
        with pytest.raises(NotFound, match="nowhere") as caught:
            known_run(facts, "nowhere")
        assert caught.value.reason == reasons_pb2.REASON_UNKNOWN_RUN


# Reveals.


def test_a_reveal_that_opens_its_commitment_is_accepted(ledger: Ledger) -> None:
    to_submit(ledger)
    said = ledger.reveal("ma", 1)
    answer = reveal(ledger, said)
    assert isinstance(answer, cycle_pb2.RevealAccepted)
    assert answer.submission == cycle_pb2.Submission(
        miner="ma",
        artifact=artifact("ma", 1),
        commit_sequence=1,
        reveal_sequence=said.sequence,
        origin_cycle=1,
        base_state=theta(1),
    )
    assert judge_reveal(ledger.facts, said) is None


def test_a_second_reveal_is_refused_and_the_first_stays(ledger: Ledger) -> None:
    to_submit(ledger)
    reveal(ledger, ledger.reveal("ma", 1))
    second = ledger.reveal("ma", 1)
    assert reason(reveal(ledger, second)) == reasons_pb2.REASON_DUPLICATE_REVEAL
    assert judge_reveal(ledger.facts, second) is None


def test_a_reveal_without_a_standing_commitment_is_refused(ledger: Ledger) -> None:
    to_submit(ledger, miners=("mb",))
    assert reason(reveal(ledger, ledger.reveal("ma", 1))) == reasons_pb2.REASON_NO_COMMITMENT


def test_a_commitment_accepted_before_its_close_was_known_does_not_stand(ledger: Ledger) -> None:
    late = ledger.commitment("ma", 1)
    accepted = judge_commitment(ledger.facts, late)
    assert isinstance(accepted, cycle_pb2.CommitmentAccepted)
    closed = cycle_pb2.WindowClosed(run=RUN, cycle=1, stream="INGRESS", last_sequence=late.sequence - 1)
    ledger.publish("commit", 1, "closed", closed)
    ledger.publish("commit", 1, "accepted", accepted, "ma")
    assert list(settle(ledger, "commit", 1).committed) == []
    refused = ledger.facts.window("commit", 1).refusal("ma", late.sequence)
    assert reason(refused) == reasons_pb2.REASON_LATE_COMMITMENT
    ledger.opened("submit", 1)
    assert reason(reveal(ledger, ledger.reveal("ma", 1))) == reasons_pb2.REASON_NO_COMMITMENT


@pytest.mark.parametrize(
    ("made", "base", "salt"),
    [
        (artifact("mz", 1), theta(1), SALT),
        (artifact("ma", 1), theta(9), SALT),
        (artifact("ma", 1), theta(1), b"t" * 32),
    ],
)
def test_what_does_not_open_the_commitment_is_refused(
    ledger: Ledger, made: ArtifactRef, base: ArtifactRef, salt: bytes
) -> None:
    to_submit(ledger)
    said = ledger.reveal("ma", 1, made, base, salt)
    assert reason(reveal(ledger, said)) == reasons_pb2.REASON_COMMITMENT_MISMATCH


def test_a_copied_commitment_opens_to_nothing(ledger: Ledger) -> None:
    commit(ledger, ledger.commitment("mb", 1, opening("ma", 1)))
    to_submit(ledger, miners=("ma",))
    copied = ledger.reveal("mb", 1, artifact("ma", 1))
    assert reason(reveal(ledger, copied)) == reasons_pb2.REASON_COMMITMENT_MISMATCH


@pytest.mark.parametrize(
    ("made", "salt"), [(ArtifactRef(digest="../etc", size=SIZE), SALT), (artifact("ma", 1), b"short")]
)
def test_malformed_openings_are_refused(ledger: Ledger, made: ArtifactRef, salt: bytes) -> None:
    to_submit(ledger)
    assert reason(reveal(ledger, ledger.reveal("ma", 1, made, salt=salt))) == reasons_pb2.REASON_MALFORMED


def test_work_on_another_state_is_stale(ledger: Ledger) -> None:
    commit(ledger, ledger.commitment("ma", 1, opening("ma", 1, base=theta(7))))
    to_submit(ledger, miners=())
    assert reason(reveal(ledger, ledger.reveal("ma", 1, base=theta(7)))) == reasons_pb2.REASON_STALE_BASE


def test_a_run_that_is_not_public_looks_like_none_to_who_has_no_part_in_it(ledger: Ledger) -> None:
    to_submit(ledger)
    ledger.facts.require_spec().visibility = "private"
    command = UploadCommand(run=RUN, cycle=1, artifact=artifact("mx", 1), base_state_digest=theta(1).digest, salt=SALT)
    with pytest.raises(NotFound) as caught:
        judge_upload(ledger.facts, "mx", command)
    with pytest.raises(NotFound) as none:
        known_run(None, RUN)
    assert str(caught.value) == str(none.value)
    command.artifact.CopyFrom(artifact("ma", 1))
    judge_upload(ledger.facts, "ma", command)


def test_the_realm_is_submission(ledger: Ledger) -> None:
    made = artifact("ma", 1)
    made.realm = REALM_PUBLIC
    to_submit(ledger)
    assert reason(reveal(ledger, ledger.reveal("ma", 1, made))) == reasons_pb2.REASON_MALFORMED


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (locked_bytes(SIZE + SIZE_TOLERANCE) + 1, reasons_pb2.REASON_OVERSIZED),
        (1 << 60, reasons_pb2.REASON_OVERSIZED),
        (SIZE - SIZE_TOLERANCE - 1, reasons_pb2.REASON_WRONG_TENSORS),
        (0, reasons_pb2.REASON_WRONG_TENSORS),
        (-5, reasons_pb2.REASON_WRONG_TENSORS),
    ],
)
def test_a_size_that_cannot_be_right_is_refused(ledger: Ledger, size: int, expected: int) -> None:
    to_submit(ledger)
    assert reason(reveal(ledger, ledger.reveal("ma", 1, artifact("ma", 1, size)))) == expected


@pytest.mark.parametrize(
    ("key", "content", "good"),
    [
        (b"k" * 32, "ab" * 32, True),
        (b"", "", True),
        (b"k" * 31, "ab" * 32, False),
        (b"k" * 32, "", False),
        (b"", "ab" * 32, False),
        (b"k" * 32, "../" * 20, False),
    ],
)
def test_a_key_is_one_and_has_the_hash_of_what_it_opens_beside_it(
    ledger: Ledger, key: bytes, content: str, good: bool
) -> None:
    to_submit(ledger)
    made = artifact("ma", 1)
    made.key, made.content = key, content
    answer = reveal(ledger, ledger.reveal("ma", 1, made))
    if good:
        assert isinstance(answer, cycle_pb2.RevealAccepted)
        assert answer.submission.artifact == made
    else:
        assert reason(answer) == reasons_pb2.REASON_MALFORMED


def test_a_locked_upload_has_room_for_its_lock(ledger: Ledger) -> None:
    ledger.miners("mc")
    to_submit(ledger, miners=("ma", "mb", "mc"))
    largest = locked_bytes(SIZE + SIZE_TOLERANCE)
    fits = reveal(ledger, ledger.reveal("mb", 1, artifact("mb", 1, largest)))
    assert isinstance(fits, cycle_pb2.RevealAccepted)
    over = reveal(ledger, ledger.reveal("mc", 1, artifact("mc", 1, largest + 1)))
    assert reason(over) == reasons_pb2.REASON_OVERSIZED


@pytest.mark.parametrize(("weighting", "fits"), [("tokens", True), ("capped", True), ("whole", False)])
def test_what_is_claimed_of_many_experts_has_room(ledger: Ledger, weighting: str, fits: bool) -> None:
    to_submit(ledger)
    spec, selection = ledger.facts.require_spec(), ledger.facts.require_selection()
    spec.merging.weighting = weighting
    del selection.layers[:]
    for layer in range(26):
        selection.layers.add(layer=layer, experts=range(64))
    claim = json.dumps(metadata_of({layer: [4096] * 64 for layer in range(26)}))
    assert len(claim) > SIZE_TOLERANCE
    judged = reveal(ledger, ledger.reveal("ma", 1, artifact("ma", 1, SIZE + len(claim))))
    assert isinstance(judged, cycle_pb2.RevealAccepted) is fits
    more = artifact("mb", 1, locked_bytes(SIZE + len(claim) + SIZE_TOLERANCE) + 1)
    assert reason(reveal(ledger, ledger.reveal("mb", 1, more))) == reasons_pb2.REASON_OVERSIZED


def test_a_reveal_before_the_submit_window_is_too_early(ledger: Ledger) -> None:
    commit(ledger, ledger.commitment("ma", 1))
    assert reason(reveal(ledger, ledger.reveal("ma", 1))) == reasons_pb2.REASON_WRONG_WINDOW


def test_a_good_reveal_that_is_late_says_that_it_rolls_over(ledger: Ledger) -> None:
    to_submit(ledger)
    ledger.closed("submit", 1)
    said = ledger.reveal("ma", 1)
    judged = judge_reveal(ledger.facts, said)
    assert isinstance(judged, CheckContent), "its content is examined all the same"
    assert judged.base == theta(1), "by the state that its own cycle started from"
    answer = reveal(ledger, said)
    assert reason(answer) == reasons_pb2.REASON_LATE_REVEAL
    assert isinstance(answer, cycle_pb2.Refused)
    assert "rolls over" in detail_of(answer)
    assert reason(reveal(ledger, ledger.reveal("ma", 1))) == reasons_pb2.REASON_DUPLICATE_REVEAL


def test_content_is_examined_by_what_the_cycle_started_from_and_not_the_run() -> None:
    ledger = Ledger()
    ledger.miners("ma")
    for cycle in (1, 2):
        to_submit(ledger, cycle, miners=("ma",))
        judged = judge_reveal(ledger.facts, ledger.reveal("ma", cycle))
        assert isinstance(judged, CheckContent)
        assert judged.base == theta(cycle)
        ledger.closed("submit", cycle)


def test_a_late_reveal_of_the_last_cycle_is_told_so() -> None:
    ledger = Ledger(cycles=1)
    ledger.miners("ma")
    to_submit(ledger, miners=("ma",))
    ledger.closed("submit", 1)
    answer = reveal(ledger, ledger.reveal("ma", 1))
    assert isinstance(answer, cycle_pb2.Refused)
    assert "last cycle" in detail_of(answer)


def test_facts_that_are_still_arriving_are_not_an_error(ledger: Ledger) -> None:
    """Streams are read side by side: an opening may be seen before the selection it rests on."""
    partial = RunFacts(RUN)
    to_submit(ledger)
    said = ledger.reveal("ma", 1)
    for stored in ledger.facts.facts.values():
        if stored.key.kind not in ("selected", "opened") or stored.key.section == "submit":
            partial.add(stored)
    assert reason(judge_reveal(partial, said)) == reasons_pb2.REASON_WRONG_WINDOW


# Uploads.


def upload(cycle: int = 1, made: ArtifactRef | None = None, salt: bytes = SALT) -> UploadCommand:
    return UploadCommand(
        run=RUN,
        cycle=cycle,
        artifact=made or artifact("ma", cycle),
        base_state_digest=theta(cycle).digest,
        salt=salt,
    )


def test_an_upload_is_permitted_to_who_opens_a_standing_commitment_even_late(ledger: Ledger) -> None:
    to_submit(ledger)
    judge_upload(ledger.facts, "ma", upload())
    ledger.closed("submit", 1)
    judge_upload(ledger.facts, "ma", upload())


@pytest.mark.parametrize(
    ("miner", "command", "expected"),
    [
        ("stranger", upload(), reasons_pb2.REASON_NOT_ENROLLED),
        ("mb", upload(), reasons_pb2.REASON_COMMITMENT_MISMATCH),
        ("ma", upload(cycle=2), reasons_pb2.REASON_WRONG_WINDOW),
        ("ma", upload(salt=b"t" * 32), reasons_pb2.REASON_COMMITMENT_MISMATCH),
        ("ma", upload(made=artifact("ma", 1, SIZE * 2)), reasons_pb2.REASON_OVERSIZED),
    ],
)
def test_other_uploads_are_not(ledger: Ledger, miner: str, command: UploadCommand, expected: int) -> None:
    to_submit(ledger)
    with pytest.raises(Invalid) as caught:
        judge_upload(ledger.facts, miner, command)
    assert caught.value.reason == expected


def test_no_upload_after_the_end(ledger: Ledger) -> None:
    to_submit(ledger)
    ledger.ended()
    with pytest.raises(Invalid, match="ended"):
        judge_upload(ledger.facts, "ma", upload())
