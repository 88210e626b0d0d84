"""Whose eyes a command has: the key that the platform would be asked with."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.cli.library.options import holdings
from connito.errors import NotFound
from connito.library.governance import Viewer
from connito.platform.datadir import DataDir
from connito.platform.session import Session
from connito.wire.identity import Identity
from connito.wire.roster import Roster

OWNER, OTHER = (Identity.generate(bytes([n]) * 32) for n in (1, 2))
PRIVATE = {"governance": {"visibility": "private", "owner": OWNER.public}}


def roster(path: Path) -> Path:
    members = {"clinic": frozenset({OWNER.public}), "bank": frozenset({OTHER.public})}
    Roster({"customer": frozenset({OWNER.public})}, organisations=members).save(path)
    return path


def test_a_customer_with_only_a_key_and_an_address_is_the_owner_of_what_is_private(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, key in (("me.nk", OWNER), ("other.nk", OTHER)):
        key.save(tmp_path / name)
    monkeypatch.setenv("CONNITO_NATS_URL", "nats://connito.example:4222")
    monkeypatch.setenv("CONNITO_ROSTER", str(roster(tmp_path / "roster.json")))
    monkeypatch.setenv("CONNITO_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CONNITO_KEY_FILE", str(tmp_path / "me.nk"))
    assert holdings(None, None).viewer == Viewer(OWNER.public, frozenset({"clinic"}))
    assert holdings(None, None).viewer.sees(PRIVATE)
    monkeypatch.setenv("CONNITO_KEY_FILE", str(tmp_path / "other.nk"))
    assert holdings(None, None).viewer == Viewer(OTHER.public, frozenset({"bank"}))
    assert not holdings(None, None).viewer.sees(PRIVATE)
    monkeypatch.delenv("CONNITO_KEY_FILE")
    assert holdings(tmp_path, None).viewer == Viewer(), "a folder is used without any key"


def test_a_key_without_an_address_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONNITO_NATS_URL", raising=False)
    monkeypatch.delenv("CONNITO_SHELF", raising=False)
    monkeypatch.setenv("CONNITO_DATA_DIR", str(tmp_path / "data"))
    OWNER.save(tmp_path / "me.nk")
    monkeypatch.setenv("CONNITO_KEY_FILE", str(tmp_path / "me.nk"))
    lacking = "there is a key, CONNITO_KEY_FILE, and no address: set CONNITO_NATS_URL"
    with pytest.raises(NotFound, match=lacking):
        Session.open(None, role="customer")
    with pytest.raises(NotFound, match=rf"no expert 'law-1' on the shelf .*{lacking}"):
        holdings(None, None).by_id("law-1")
    # Whoever names a folder means that one; and nobody hears of a key that he has not set.
    with pytest.raises(NotFound, match=r"^nothing runs in"):
        Session.open(tmp_path / "data", role="customer")
    monkeypatch.delenv("CONNITO_KEY_FILE")
    with pytest.raises(NotFound, match=r"^nothing runs in"):
        Session.open(None, role="customer")


def test_beside_a_data_directory_it_is_the_customer_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONNITO_NATS_URL", "CONNITO_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert holdings(None, tmp_path).viewer == Viewer(), "nobody is anybody before there is a key"
    data = DataDir.open(tmp_path)
    OWNER.save(data.keys / "customer.nk")
    assert holdings(None, tmp_path).viewer == Viewer(OWNER.public)
    roster(data.roster)
    assert holdings(None, tmp_path).viewer == Viewer(OWNER.public, frozenset({"clinic"}))
    assert holdings(None, tmp_path, "ada", ["bank"]).viewer == Viewer("ada", frozenset({"bank"}))
