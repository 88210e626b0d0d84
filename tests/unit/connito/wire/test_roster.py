from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from connito.errors import Invalid
from connito.wire.identity import Identity
from connito.wire.roster import Roster

KEY, OTHER = Identity.generate(b"k" * 32).public, Identity.generate(b"o" * 32).public


def test_roles_and_stakes() -> None:
    roster = Roster({"validator": frozenset({KEY, OTHER})}, {KEY: 2.5})
    assert roster.permits("validator", KEY)
    assert not roster.permits("coordinator", KEY)
    assert (roster.stake(KEY), roster.stake(OTHER), roster.stake("U" * 56)) == (2.5, 1.0, 0.0)


def test_saved_and_loaded_again(tmp_path: Path) -> None:
    roster = Roster({"validator": frozenset({KEY}), "coordinator": frozenset({OTHER})}, {KEY: 2.0})
    roster.save(tmp_path / "deep" / "roster.json")
    assert Roster.load(tmp_path / "deep" / "roster.json") == roster


def test_organisations_are_kept_and_tell_memberships(tmp_path: Path) -> None:
    organisations = {"clinic": frozenset({KEY, OTHER}), "court": frozenset({OTHER})}
    roster = Roster({"customer": frozenset({KEY})}, organisations=organisations)
    roster.save(tmp_path / "roster.json")
    again = Roster.load(tmp_path / "roster.json")
    assert again == roster
    assert (again.memberships(KEY), again.memberships(OTHER)) == (frozenset({"clinic"}), frozenset({"clinic", "court"}))
    assert again.memberships("U" * 56) == frozenset()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "no roster"),
        ("[]", "no roster"),
        ("{}", "no roster"),
        (json.dumps({"keys": {"king": [KEY]}}), "king"),
        (json.dumps({"keys": {"validator": ["nonsense"]}}), "nonsense"),
        (json.dumps({"keys": {}, "stakes": {KEY: -1}}), "negative"),
        (json.dumps({"keys": {}, "stakes": {KEY: math.nan}}), "no finite number"),
        (json.dumps({"keys": {}, "stakes": {KEY: math.inf}}), "no finite number"),
        (json.dumps({"keys": {}, "stakes": {KEY: "much"}}), "no roster"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "roster.json"
    path.write_text(content)
    with pytest.raises(Invalid, match=message) as caught:
        Roster.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_roster_says_which_variable_to_set(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="CONNITO_ROSTER"):
        Roster.load(tmp_path / "none.json")
