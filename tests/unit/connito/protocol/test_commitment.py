from __future__ import annotations

from typing import Any

import pytest
from connito.errors import Invalid
from connito.protocol.commitment import commitment_digest, opens
from connito.wire.hashing import hash_fields
from hypothesis import given
from hypothesis import strategies as st

FIELDS: dict[str, Any] = {
    "run": "r1",
    "cycle": 3,
    "miner": "UA",
    "base_state_digest": "a" * 64,
    "artifact_digest": "b" * 64,
    "salt": b"s" * 16,
}
OTHER: dict[str, Any] = {
    "run": "r2",
    "cycle": 4,
    "miner": "UB",
    "base_state_digest": "c" * 64,
    "artifact_digest": "c" * 64,
    "salt": b"t" * 16,
}


def test_opens_with_exactly_the_fields_it_was_made_of() -> None:
    digest = commitment_digest(**FIELDS)
    assert len(digest) == 32
    assert opens(digest, **FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_any_other_field_does_not_open_it(field: str) -> None:
    assert not opens(commitment_digest(**FIELDS), **{**FIELDS, field: OTHER[field]})


def test_a_copied_commitment_opens_to_nothing() -> None:
    stolen = commitment_digest(**FIELDS)
    assert not opens(stolen, **{**FIELDS, "miner": "UTHIEF"})


@pytest.mark.parametrize("salt", [b"", b"x" * 15, b"x" * 65])
def test_salts_that_are_too_short_or_long_are_refused(salt: bytes) -> None:
    with pytest.raises(Invalid, match="salt"):
        commitment_digest(**{**FIELDS, "salt": salt})


@pytest.mark.parametrize("digest", ["", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_digests_must_be_lower_case_hex(digest: str) -> None:
    with pytest.raises(Invalid, match="artifact digest"):
        commitment_digest(**{**FIELDS, "artifact_digest": digest})


@given(st.lists(st.text()), st.lists(st.text()))
def test_fields_cannot_be_shifted_into_each_other(one: list[str], other: list[str]) -> None:
    assert (hash_fields(b"t", *one) == hash_fields(b"t", *other)) == (one == other)


def test_the_format_stands() -> None:
    """A change of this value breaks every commitment in every log."""
    assert commitment_digest(**FIELDS).hex() == "abe1277e5a89f9327e6bccbbd8fde96b3bc7d9de5a054fe2afb01b1caf308414"
