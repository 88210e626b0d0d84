"""Lending what no run made, and one file for all that is lent to a key."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from connito.cli.app import app
from connito.client import lending
from connito.errors import NotFound, ObjectMissing, VerificationFailed
from connito.store.keyring import Keyring
from connito.v1.artifacts_pb2 import REALM_PRIVATE, ArtifactRef
from connito.v1.run_pb2 import ExpertDeposited
from connito.wire import private
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity, short_key
from connito.wire.sealing import NoKey, seal_file
from connito.wire.subjects import LIBRARY
from typer.testing import CliRunner

OWNER, OPERATOR, LATE, ELSEWHERE = (Identity.generate(bytes([n]) * 32) for n in (1, 2, 3, 4))


class Store:
    """Sealed secrets by their digest."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sealed = folder, dict[str, bytes]()

    def seal(self, what: str, *readers: Identity) -> str:
        (plain := self.folder / "plain").write_bytes(private.secret_of(OWNER, what))
        seal_file(plain, out := self.folder / what, OWNER, [reader.public for reader in readers])
        digest = hashlib.sha256(data := out.read_bytes()).hexdigest()
        self.sealed[digest] = data
        return digest

    async def sealed_secret(self, secret: str) -> bytes:
        if secret not in self.sealed:
            raise ObjectMissing("gone")
        return self.sealed[secret]


def deposited(*secrets: str) -> Any:
    refs = [ArtifactRef(digest="d" * 64, realm=REALM_PRIVATE, secret=secret) for secret in secrets]
    message = ExpertDeposited(expert=refs[0], files=refs[1:])
    return SimpleNamespace(runs={LIBRARY: SimpleNamespace(deposits={"x": SimpleNamespace(message=message)})})


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`platform.log` is what is read, `platform.store` the store."""
    found = SimpleNamespace(store=Store(tmp_path), log=SimpleNamespace(runs={}))

    async def read(*_: object) -> Any:
        return found.log

    class Bus:
        async def __aenter__(self) -> None:
            """Connect."""

        async def __aexit__(self, *_: object) -> None:
            """Leave."""

    roster = SimpleNamespace(permits=lambda role, key: role in ("committer", "validator"))
    session = SimpleNamespace(roster=roster, bus=Bus, store=lambda: found.store, identity=OPERATOR)
    monkeypatch.setattr(lending, "read_log", read)
    monkeypatch.setattr("connito.platform.session.Session.open", lambda *_, **__: session)
    found.session = session
    return found


def test_a_composition_is_lent_and_opens(platform: Any, tmp_path: Path) -> None:
    one, two = platform.store.seal("one", OPERATOR), platform.store.seal("two", OPERATOR)
    closed = platform.store.seal("closed", ELSEWHERE)
    platform.log = deposited(one, two, closed, "a" * 64, "")
    ref = ArtifactRef(digest="d" * 64, realm=REALM_PRIVATE, secret=two)
    lent = tmp_path / "lent.json"
    keyring = Keyring(LATE, lent)
    with pytest.raises(NoKey):
        keyring.key(ref, platform.store.sealed.__getitem__)
    found = lending.boxes(platform.session, LIBRARY, LATE.public)
    assert set(found) == {one, two}, "what this key does not open, or is gone, is passed over"
    lent.write_text(json.dumps(found))
    key = keyring.key(ref, platform.store.sealed.__getitem__)
    assert key == private.key_of_content(private.secret_of(OWNER, "two"), ref.digest)
    with pytest.raises(VerificationFailed):
        Keyring(ELSEWHERE, lent).key(ref, platform.store.sealed.__getitem__)


@pytest.mark.parametrize("log", [SimpleNamespace(runs={}), SimpleNamespace(runs={LIBRARY: RunFacts(LIBRARY)})])
def test_nothing_to_lend_is_said(platform: Any, log: Any) -> None:
    platform.log = log
    with pytest.raises(NotFound, match="no private expert"):
        lending.boxes(platform.session, LIBRARY, LATE.public)


def test_one_file_takes_all_that_a_key_is_lent(platform: Any, tmp_path: Path) -> None:
    out, secrets = tmp_path / "lent.json", [platform.store.seal(name, OPERATOR) for name in ("one", "two")]
    for secret in secrets:
        platform.log = deposited(secret)
        done = CliRunner().invoke(app, ["access", "lend", LIBRARY, LATE.public, str(out)])
        assert done.exit_code == 0, done.output
    assert set(json.loads(out.read_text())) == {*secrets, "reader"}
    for secret in secrets:
        ref = ArtifactRef(digest="e" * 64, realm=REALM_PRIVATE, secret=secret)
        assert Keyring(LATE, out).key(ref, platform.store.sealed.__getitem__)
    with pytest.raises(NoKey, match=f"was lent to the key {short_key(LATE.public)}"):
        Keyring(ELSEWHERE, out).key(ref, platform.store.sealed.__getitem__)
    # What it opens itself it opens, whatever file lies beside.
    own = ArtifactRef(digest="e" * 64, realm=REALM_PRIVATE, secret=secrets[0])
    assert Keyring(OPERATOR, out).key(own, platform.store.sealed.__getitem__)
    before = out.read_bytes()
    done = CliRunner().invoke(app, ["access", "lend", LIBRARY, ELSEWHERE.public, str(out)])
    assert done.exit_code != 0, "another key's boxes would take the place of these"
    assert out.read_bytes() == before
