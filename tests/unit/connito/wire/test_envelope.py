from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.envelope_pb2 import Envelope
from connito.wire.envelope import MAX_ENVELOPE_BYTES, check, open_bytes, seal
from connito.wire.identity import Identity
from hypothesis import given
from hypothesis import strategies as st

ALICE, BOB = Identity.generate(b"a" * 32), Identity.generate(b"b" * 32)
SUBJECT = "connito.v1.r.ingress.m.commitment"
MESSAGE = cycle_pb2.Commitment(run="r", cycle=3, digest=b"d" * 32)


def sealed() -> Envelope:
    return seal(ALICE, SUBJECT, MESSAGE, now_ms=1_000)


def test_round_trip() -> None:
    opened = open_bytes(sealed().SerializeToString(), SUBJECT)
    assert opened.read(cycle_pb2.Commitment) == MESSAGE
    assert (opened.signer, opened.issued_at_unix_ms) == (ALICE.public, 1_000)


def test_two_sealings_of_one_message_differ() -> None:
    assert sealed().SerializeToString() != sealed().SerializeToString()


@pytest.mark.parametrize(
    "change",
    [
        {"payload": b"other"},
        {"type": "connito.v1.Reveal"},
        {"signer": BOB.public},
        {"nonce": b"n" * 16},
        {"issued_at_unix_ms": 1_001},
        {"signature": b"s" * 64},
        {"signature": b""},
    ],
)
def test_nothing_can_be_changed(change: dict[str, bytes | int | str]) -> None:
    envelope = sealed()
    for name, value in change.items():
        setattr(envelope, name, value)
    with pytest.raises(Invalid) as caught:
        check(envelope, SUBJECT)
    assert caught.value.reason == reasons_pb2.REASON_BAD_SIGNATURE


def test_it_does_not_verify_on_another_subject() -> None:
    with pytest.raises(Invalid) as caught:
        check(sealed(), SUBJECT + ".x")
    assert caught.value.reason == reasons_pb2.REASON_BAD_SIGNATURE


def test_a_later_schema_is_refused_as_such() -> None:
    envelope = sealed()
    envelope.schema_version = 2
    with pytest.raises(Invalid, match="upgrade") as caught:
        check(envelope, SUBJECT)
    assert caught.value.reason == reasons_pb2.REASON_UNSUPPORTED_SCHEMA


def test_a_short_nonce_is_refused() -> None:
    envelope = sealed()
    envelope.nonce = b"n"
    with pytest.raises(Invalid, match="nonce"):
        check(envelope, SUBJECT)


def test_another_type_than_expected() -> None:
    with pytest.raises(Invalid, match=r"expected a connito\.v1\.Reveal") as caught:
        check(sealed(), SUBJECT).read(cycle_pb2.Reveal)
    assert caught.value.reason == reasons_pb2.REASON_UNKNOWN_TYPE


def test_oversized_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(Invalid) as caught:
        open_bytes(b"\x00" * (MAX_ENVELOPE_BYTES + 1), SUBJECT)
    assert caught.value.reason == reasons_pb2.REASON_OVERSIZED


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(Invalid) as caught:
        open_bytes(data, SUBJECT)
    assert caught.value.reason != reasons_pb2.REASON_UNSPECIFIED


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_any_flipped_byte_is_noticed(position: int, flip: int) -> None:
    data = bytearray(sealed().SerializeToString())
    data[position % len(data)] ^= flip
    try:
        opened = open_bytes(bytes(data), SUBJECT)
    except Invalid:
        return
    # Protobuf has spellings: a byte may change that is not part of any value.
    assert opened.read(cycle_pb2.Commitment) == MESSAGE
    assert opened.signer == ALICE.public
