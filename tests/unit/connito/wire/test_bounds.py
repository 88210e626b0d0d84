"""What participants supply is bounded, all of it, and refused where it is over."""

from __future__ import annotations

from typing import Any

import pytest
from connito.errors import Invalid
from connito.protocol.findings import Refusal
from connito.v1 import bounds_pb2, cycle_pb2, reasons_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.wire.bounds import check_bounds, cut
from connito.wire.envelope import MAX_ENVELOPE_BYTES, seal
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.subjects import fact, ingress
from connito.wire.verification import CATALOGUE, INGRESS, verify_fact, verify_ingress
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

KEY = Identity.generate(bytes([7]) * 32)
ROSTER = Roster({"validator": frozenset({KEY.public})})
TEXTS = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
TAKEN: set[type[Message]] = {
    *INGRESS.values(),
    *(message for message, role, _ in CATALOGUE.values() if role == "validator"),
    services_pb2.EnrolMinerCommand,
    services_pb2.UploadCommand,
    services_pb2.DownloadsCommand,
}


def unbounded(descriptor: Any) -> set[str]:
    """Fields that somebody may fill without an end."""
    found = set()
    for field in descriptor.fields:
        options = field.GetOptions().Extensions
        size, entries = options[bounds_pb2.max_bytes], options[bounds_pb2.max_entries]
        if field.is_repeated and not entries:
            found.add(field.full_name)
        if field.type in TEXTS and not size:
            found.add(field.full_name)
        if field.type == FieldDescriptor.TYPE_MESSAGE and not size:
            found |= unbounded(field.message_type)
    return found


@pytest.mark.parametrize("message", sorted(TAKEN, key=str))
def test_nothing_that_a_participant_supplies_is_without_a_bound(message: type[Message]) -> None:
    assert unbounded(message.DESCRIPTOR) == set()


def reveal(media_type: str) -> cycle_pb2.Reveal:
    ref = ArtifactRef(digest="a" * 64, size=10, media_type=media_type, realm=REALM_SUBMISSION)
    return cycle_pb2.Reveal(run="r", cycle=1, artifact=ref, base_state_digest="b" * 64, salt=bytes(32))


def said(message: cycle_pb2.Reveal) -> Record:
    subject = ingress("r", KEY.public, "reveal")
    return Record("INGRESS", 1, subject, seal(KEY, subject, message).SerializeToString(), 0)


def test_a_reveal_with_a_long_media_type_is_refused_before_anybody_repeats_it() -> None:
    assert verify_ingress(said(reveal("application/vnd.connito.expert-state"))).message
    with pytest.raises(Invalid, match=r"Reveal\.artifact has \d+ bytes, over the limit of 300") as caught:
        verify_ingress(said(reveal("x" * 15_800)))
    assert caught.value.reason == reasons_pb2.REASON_OVERSIZED


def report(**score: Any) -> Record:
    given: dict[str, Any] = {"miner": "m", "reason": reasons_pb2.REASON_NOT_SIGNIFICANT} | score
    scores = [cycle_pb2.SubmissionScore(**given)]
    message = cycle_pb2.ScoreReport(run="r", cycle=1, validator=KEY.public, scores=scores)
    subject = fact("r", "validate", 1, "report", KEY.public)
    return Record("VALIDATE", 1, subject, seal(KEY, subject, message).SerializeToString(), 0)


def nested(depth: int) -> cycle_pb2.Finding:
    return cycle_pb2.Finding(parts=[nested(depth - 1)] if depth else [], text="x" * 90)


@pytest.mark.parametrize(
    "score",
    [
        {"detail": "x" * 1001},
        {"detail": "é" * 501},
        {"finding": cycle_pb2.Finding(text="x" * 900)},
        {"finding": cycle_pb2.Finding(miners=["m"] * 300)},
        {"finding": nested(10)},
        {"losses": [cycle_pb2.SequenceLoss(domain="x" * 81)]},
        {"miner": "m" * 57},
    ],
)
def test_a_validators_words_are_bounded(score: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match="over the limit of"):
        verify_fact(report(**score), ROSTER)


def test_words_up_to_the_bound_are_taken() -> None:
    for score in (
        {"detail": "x" * 1000},
        {"finding": nested(3)},
        {"losses": [cycle_pb2.SequenceLoss(domain="x" * 80)]},
    ):
        assert verify_fact(report(**score), ROSTER).message


def test_the_worst_words_about_five_hundred_miners_fit_into_a_verdict() -> None:
    worst = cycle_pb2.Finding(text="x" * 790)
    verdicts = [
        cycle_pb2.Verdict(miner="U" * 56, detail="", finding=worst, utility=0.1, rank=1, reward=1 << 40)
        for _ in range(500)
    ]
    scored = cycle_pb2.CycleScored(run="r" * 80, cycle=1, verdicts=verdicts)
    check_bounds(cycle_pb2.SubmissionScore(finding=worst))
    assert scored.ByteSize() < MAX_ENVELOPE_BYTES


def test_what_a_file_is_quoted_with_is_cut() -> None:
    refusal = Refusal.of(Invalid("name " + "ü" * 5000, about="tensor" * 5000))
    check_bounds(cycle_pb2.SubmissionScore(finding=refusal.finding))
    assert refusal.finding.text.endswith("…")


@pytest.mark.parametrize("size", [3, 10, 400])
@pytest.mark.parametrize("text", ["", "a", "short text of twenty", "é" * 500, "🙂" * 300])
def test_a_cut_text_keeps_to_its_size_and_to_whole_characters(text: str, size: int) -> None:
    found = cut(text, size)
    assert len(found.encode()) <= size
    assert found == text or text.startswith(found.removesuffix("…"))
