from __future__ import annotations

import base64
from pathlib import Path

import pytest
from connito.client import joining
from connito.errors import Invalid, Retry
from connito.platform.accounts import Accounts
from connito.platform.membership import Membership
from connito.platform.session import Session
from connito.wire.identity import Identity
from connito.wire.roster import Roster


def told(folder: Path) -> Path:
    key = folder / "miner.nk"
    Identity.generate().save(key)
    Roster().save(folder / "roster.json")
    Membership("nats://bus:4222", str(folder / "roster.json"), "token").keep(key)
    return key


def test_a_key_that_was_told_needs_no_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = told(tmp_path / "old")
    assert key.with_name("miner.nk.json").stat().st_mode & 0o077 == 0
    moved = (tmp_path / "old").rename(tmp_path / "new") / "miner.nk"
    assert Membership.of(moved) == Membership("nats://bus:4222", str(tmp_path / "new" / "roster.json"), "token")
    for name in ("CONNITO_NATS_URL", "CONNITO_ROSTER", "CONNITO_S3_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CONNITO_KEY_FILE", str(moved))
    session = Session.open(None, role="customer")
    assert (session.nats_url, session.identity.public) == ("nats://bus:4222", Identity.load(moved).public)
    assert not session.has_store
    # What somebody sets outweighs what was told.
    monkeypatch.setenv("CONNITO_NATS_URL", "nats://other:4222")
    assert Session.open(None, role="customer").nats_url == "nats://other:4222"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"bus": 1}', "null", "[" * 100_000])
def test_a_damaged_file_is_one_sentence(tmp_path: Path, damage: str) -> None:
    key = told(tmp_path)
    key.with_name("miner.nk.json").write_text(damage)
    with pytest.raises(Invalid, match="join again"):
        Membership.of(key)


def test_what_is_no_invite_leaves_no_key_behind(tmp_path: Path) -> None:
    key = tmp_path / "miner.nk"
    for invite in ("nonsense!", "x" * 5000):
        with pytest.raises(Invalid, match="not an invite"):
            joining.admitted(key, invite)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(Invalid, match="connito miner init"):
        joining.admitted(key, "")


def test_a_key_that_is_in_does_not_ask_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator that the token names may be away then."""

    def nobody(*_: object) -> None:
        raise Retry("nobody is there")

    monkeypatch.setattr(joining, "_change", nobody)
    key, token = told(tmp_path), base64.urlsafe_b64encode(b"\x0a\x00").decode()
    accounts = Accounts(tmp_path / "accounts")
    accounts.make()
    with pytest.raises(Retry):
        joining.admitted(key, token)
    accounts.welcome("miner", Identity.load(key)).save(key)
    identity, member = joining.admitted(key, token)
    assert (len(identity.passes), member.bus) == (2, "nats://bus:4222")
