"""A roster that is another file: a sentence with cause and remedy, and nothing of what the file holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.errors import Invalid
from connito.wire.roster import Roster


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xfa\x01secret", "it is not JSON"),
        (b"SUsecret", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b'{"keys": 5, "x": "secret"}', "a field of it has another form"),
        (b'{"keys": {}, "stakes": {"U": "secret"}}', "a field of it has another form"),
    ],
)
def test_what_is_no_roster_is_told_in_a_sentence(content: bytes, why: str, tmp_path: Path) -> None:
    path = tmp_path / "roster.json"
    path.write_bytes(content)
    with pytest.raises(Invalid) as told:
        Roster.load(path)
    assert str(told.value) == f"{path} is no roster: {why}; set CONNITO_ROSTER to the operator's roster.json"
