"""What admits miners is replaced, in a folder of `connito up`: the miners that it runs itself go on."""

from __future__ import annotations

from pathlib import Path

from connito.local.identities import load_members, participants, write_roster
from connito.platform.access import Access
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir
from connito.wire.identity import Identity


def issuers(path: Path) -> set[str]:
    import base64
    import json

    bodies = [token.split(".")[1] for token in Identity.load(path).passes]
    return {json.loads(base64.urlsafe_b64decode(body + "==="))["iss"] for body in bodies}


def test_miners_with_a_key_in_the_folder_get_their_new_passes(tmp_path: Path) -> None:
    data, accounts = DataDir(tmp_path), Accounts(tmp_path)
    accounts.make()
    members = load_members(data, accounts, participants(2, 1, ("copier",)), seed=None)
    write_roster(data, accounts, members)
    access = Access.open(tmp_path)
    access.rotate("committer")
    others = {
        path: path.read_text() for path in data.keys.glob("*.nk") if path.stem not in ("miner-1", "miner-2", "copier-1")
    }
    access.renew_passes()
    signers = access.accounts.signers("miner")
    for name in ("miner-1", "miner-2", "copier-1"):
        assert issuers(data.keys / f"{name}.nk") <= signers
    assert {path: path.read_text() for path in others} == others


def test_a_miner_that_was_put_out_stays_out(tmp_path: Path) -> None:
    """A pass that is signed after a revocation is good."""
    data, accounts = DataDir(tmp_path), Accounts(tmp_path)
    accounts.make()
    write_roster(data, accounts, load_members(data, accounts, participants(2, 1, ()), seed=None))
    access = Access.open(tmp_path)
    out = data.keys / "miner-1.nk"
    before = out.read_text()
    access.accounts.revoke([Identity.load(out).public])
    access.renew_passes()
    assert out.read_text() == before
    assert issuers(data.keys / "miner-2.nk") <= access.accounts.signers("miner")
