"""A hotkey is a miner's where both have signed it, and only then do the miner's units go to its UID."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from connito.client import hotkeys, runs
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.views.ledger import MINER, UNALLOCATED, Entry
from connito.wire.identity import Identity

from tests.unit.connito.cli.conftest import Call, call

__all__ = ["call"]

# The address of the seed 0x1111…, to bind to.
ONE = "5DtDLm5rQHShDqojQpsvcN8tRXHVFaecfDoRet1SU6BFD9Fi"


class Stand:
    """What `bittensor_wallet.Keypair` does for us, with a digest for a signature."""

    def __init__(self, ss58_address: str) -> None:
        if not isinstance(ss58_address, str):
            raise TypeError("argument 'ss58_address'")
        if len(ss58_address) != 48 or ss58_address[0] != "5":
            raise ValueError("Invalid SS58 address: Length is bad")
        self.ss58_address = ss58_address

    def verify(self, data: bytes, signature: bytes) -> bool:
        if len(signature) != 64:
            raise ValueError("Invalid SR25519 signature.")
        return signature == hashlib.sha512(self.ss58_address.encode() + data).digest()


@pytest.fixture(params=["stand-in", "bittensor_wallet"])
def wallet(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Addresses, and how their keys sign."""
    if request.param == "stand-in":
        module: Any = ModuleType("bittensor_wallet")
        module.Keypair = Stand
        monkeypatch.setitem(sys.modules, "bittensor_wallet", module)
        names = [ONE, "5" + "B" * 47, "5" + "C" * 47]
        return SimpleNamespace(
            names=names, sign=lambda name, line: hashlib.sha512(name.encode() + line.encode()).hexdigest()
        )
    real: Any = pytest.importorskip(
        "bittensor_wallet", reason="bittensor_wallet is not installed: NO real hotkey's signature is checked here"
    )
    keys = [real.Keypair.create_from_seed("0x" + digit * 64) for digit in "123"]
    known = {key.ss58_address: key for key in keys}
    return SimpleNamespace(names=[*known], sign=lambda name, line: bytes(known[name].sign(line.encode())).hex())


def bound(wallet: SimpleNamespace, miner: Identity, number: int, file: Path) -> dict[str, str]:
    name = wallet.names[number]
    return hotkeys.bind(miner, name, wallet.sign(name, hotkeys.statement(miner.public, name)), file)


MINERS = [Identity.generate(bytes([number]) * 32) for number in range(1, 5)]


def test_both_sign_and_a_folder_of_bindings_is_read(wallet: SimpleNamespace, tmp_path: Path) -> None:
    for number in (0, 1):
        bound(wallet, MINERS[number], number, tmp_path / f"{number}.json")
    expected = {MINERS[0].public: wallet.names[0], MINERS[1].public: wallet.names[1]}
    assert hotkeys.read([tmp_path]) == expected
    assert hotkeys.read([tmp_path / "0.json", tmp_path]) == expected


def test_neither_binds_the_other_alone(wallet: SimpleNamespace, tmp_path: Path) -> None:
    mine, other = MINERS[:2]
    line = hotkeys.statement(mine.public, wallet.names[0])
    wrong = {
        "another hotkey's": wallet.sign(wallet.names[1], line),
        "over another miner": wallet.sign(wallet.names[0], hotkeys.statement(other.public, wallet.names[0])),
        "over another hotkey": wallet.sign(wallet.names[0], hotkeys.statement(mine.public, wallet.names[1])),
        "short": "00",
        "of zeros": "00" * 64,
    }
    for signature in wrong.values():
        with pytest.raises(VerificationFailed, match="is not signed by the hotkey"):
            hotkeys.bind(mine, wallet.names[0], signature, tmp_path / "no.json")
    assert not (tmp_path / "no.json").exists()
    note = bound(wallet, mine, 0, tmp_path / "yes.json")
    stolen = {**note, "miner": other.public}
    for changed in (stolen, {**note, "miner_signature": "00" * 64}, {**note, "hotkey": wallet.names[1]}):
        with pytest.raises(VerificationFailed, match="is not signed by U"):
            hotkeys.check(changed, "this")
    with pytest.raises(VerificationFailed, match="is not signed by the hotkey"):
        hotkeys.check({**note, "hotkey_signature": note["miner_signature"]}, "this")


def test_a_miner_has_one_hotkey_and_a_hotkey_may_have_several_miners(wallet: SimpleNamespace, tmp_path: Path) -> None:
    bound(wallet, MINERS[0], 0, tmp_path / "a.json")
    bound(wallet, MINERS[1], 0, tmp_path / "b.json")
    assert set(hotkeys.read([tmp_path]).values()) == {wallet.names[0]}
    bound(wallet, MINERS[0], 1, tmp_path / "c.json")
    with pytest.raises(Invalid, match=r"c\.json binds U\w+ a second time"):
        hotkeys.read([tmp_path])


@pytest.mark.parametrize(
    "change",
    [
        {"miner": 3}, {"miner": "U"}, {"hotkey": []}, {"hotkey": "\ud800"}, {"miner_signature": "x"},
        {"hotkey_signature": None}, {"hotkey": "5short"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_binding_is_said_to_be_none(change: dict[str, Any], wallet: SimpleNamespace, tmp_path: Path) -> None:
    note = bound(wallet, MINERS[0], 0, tmp_path / "a.json")
    changed = {**note, **change}
    if change == {"hotkey": "5short"}:
        line = hotkeys.statement(MINERS[0].public, "5short")
        changed["miner_signature"] = MINERS[0].sign_text(f"{line}\n".encode()).hex()
    (tmp_path / "a.json").write_text(json.dumps(changed))
    with pytest.raises(Invalid, match=r"is no binding of a hotkey|is no ss58 address"):
        hotkeys.read([tmp_path])


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 100_000, "{}", "\0"])
def test_a_file_of_something_else(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(Invalid, match=r"a\.json is no"):
        hotkeys.read([tmp_path])
    with pytest.raises(NotFound, match="cannot read"):
        hotkeys.read([tmp_path / "none.json"])


def test_without_the_extra_its_name_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bittensor_wallet", None)
    with pytest.raises(Invalid, match=r"pip install 'connito\[bittensor\]'"):
        hotkeys.bind(MINERS[0], ONE, "00" * 64, tmp_path / "a.json")


def book(wrong: bool = False) -> Callable[..., tuple[None, list[Entry], list[str]]]:
    paid = [(1, 0, 600), (1, 1, 300), (1, 2, 100), (2, 0, 600), (2, 1, 400), (2, 3, 0)]
    rows = [Entry(cycle, MINERS[who].public, "", MINER, units, 0, "", 0) for cycle, who, units in paid]
    rows += [Entry(cycle, "", "", UNALLOCATED, 0, 0, "", 0) for cycle in (1, 2)]
    return lambda *_: (None, rows, ["cycle 2: 1 units for 2"] if wrong else [])


def test_units_become_weights_of_the_uids_that_the_hotkeys_have(
    wallet: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr(runs, "book_of", book())
    folder = tmp_path / "bindings"
    folder.mkdir()
    key = tmp_path / "m.nk"
    for number in (0, 1):
        MINERS[number].save(key)
        name = wallet.names[number]
        asked = call("payouts", "bind", name, "--key", key, "--json")
        line = json.loads(asked.out)["statement"]
        signature = wallet.sign(name, line)
        done = call("payouts", "bind", name, "--key", key, "--signature", signature, "--out", folder / f"{number}.json")
        assert (done.code, done.err) == (0, "")
    graph = tmp_path / "metagraph.json"
    graph.write_text(json.dumps([wallet.names[2], wallet.names[1], "5other", wallet.names[0]]))
    asked_for = ("payouts", "weights", "run", "--first", 1, "--last", 2, "--binding", folder, "--metagraph", graph)
    done = call(*asked_for, "--json")
    assert json.loads(done.out) == {
        "run": "run", "first": 1, "last": 2, "uids": [1, 3], "weights": [38229, 65535], "units": [700, 1200],
        "left_out": {MINERS[2].public: 100},
    }  # fmt: skip
    assert f"left out, without a UID: {MINERS[2].public}, 100 units" in call(*asked_for).out
    few = call(*asked_for, "--min-allowed", 3)
    assert (few.code, "the subnet wants 3" in few.err) == (3, True)
    capped = json.loads(call(*asked_for, "--max-weight", 32768, "--json").out)["weights"]
    assert capped == [65534, 65535]  # 65533 is nearer, and would be one part too much for the other.
    bound(wallet, MINERS[2], 1, folder / "shared.json")
    shared = json.loads(call(*asked_for, "--json").out)
    assert (shared["units"], shared["left_out"]) == ([800, 1200], {})
    graph.write_text(json.dumps([wallet.names[0]] * 2))
    assert "names a hotkey twice" in call(*asked_for).err
    graph.write_text('{"0": "5"}')
    assert "no JSON list of hotkeys" in call(*asked_for).err
    monkeypatch.setattr(runs, "book_of", book(wrong=True))
    assert call(*asked_for).code == 6
