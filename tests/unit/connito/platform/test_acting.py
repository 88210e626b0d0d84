"""Whose eyes a command has: the key that the platform would be asked with."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.cli.library.options import holdings
from connito.library.governance import Viewer
from connito.platform.datadir import DataDir
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
