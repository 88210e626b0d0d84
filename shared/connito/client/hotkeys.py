"""Hotkeys of Bittensor that belong to miners' keys, and a run's ledger as the weights that a validator of a subnet sets.

A binding is a JSON file of `miner`, `hotkey`, and two signatures (hexadecimal) over one line of text that names both: the
miner's key (ed25519, with the line's end) and the hotkey (sr25519, as `btcli wallet sign` makes it). Neither can bind the
other without it. Nothing here speaks to a chain.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from connito.client import runs
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.files import write_durably
from connito.runtime.extras import extras_named
from connito.views.weights import U16_MAX, earned, vector
from connito.wire.identity import Identity, is_public_key, verify_text

_LIMIT = 1 << 22


def statement(miner: str, hotkey: str) -> str:
    """Return the line that both sign."""
    return f"connito.v1 binds miner {miner} and hotkey {hotkey}"


def bind(identity: Identity, hotkey: str, signature: str, file: Path) -> dict[str, str]:
    """Write the binding of `identity` and `hotkey` (ss58). `signature`: the hotkey's over `statement`, hexadecimal.

    Raises `VerificationFailed` for another signature, `Invalid` for what is no address and without `connito[bittensor]`.
    """
    line = statement(identity.public, hotkey)
    signed = identity.sign_text(f"{line}\n".encode()).hex()
    note = {"miner": identity.public, "hotkey": hotkey, "miner_signature": signed, "hotkey_signature": signature}
    check(note, "the binding")
    write_durably(file, json.dumps(note, indent=2) + "\n")
    return note


def check(note: dict[str, str], where: object) -> None:
    """Raise `VerificationFailed` where a binding is not signed by both, `Invalid` where it is none."""
    try:
        miner, hotkey = note["miner"], note["hotkey"]
        ours, theirs = (
            bytes.fromhex(note[name].removeprefix("0x")) for name in ("miner_signature", "hotkey_signature")
        )
        if not is_public_key(miner):
            raise ValueError("its miner is no public key")
        if not isinstance(hotkey, str) or not hotkey.isascii():
            raise ValueError("its hotkey is no address")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Invalid(f"{where} is no binding of a hotkey: {error}; make one with `connito payouts bind`") from error
    line = statement(miner, hotkey)
    if not verify_text(miner, f"{line}\n".encode(), ours):
        raise VerificationFailed(f"{where} is not signed by {miner}; the miner has to make it with its key")
    if not _verified(hotkey, line.encode(), theirs):
        raise VerificationFailed(f"{where} is not signed by the hotkey {hotkey}; sign this with it: {line}")


def read(files: Sequence[Path]) -> dict[str, str]:
    """Return hotkeys by miner from checked bindings; of a folder every `.json`. Raises `Invalid` for a miner with two hotkeys."""
    found: dict[str, str] = {}
    for file in [one for path in files for one in (sorted(path.glob("*.json")) if path.is_dir() else [path])]:
        note = _json(file)
        if not isinstance(note, dict):
            raise Invalid(f"{file} is no binding of a hotkey; make one with `connito payouts bind`")
        check(note, file)
        if found.setdefault(note["miner"], note["hotkey"]) != note["hotkey"]:
            raise Invalid(f"{file} binds {note['miner']} a second time, to another hotkey; keep the one that counts")
    return found


def weights(
    run: str,
    cycles: tuple[int, int],
    bindings: Sequence[Path],
    metagraph: Path,
    max_weight: int = U16_MAX,
    min_allowed: int = 0,
    folder: Path | None = None,
    data_dir: Path | None = None,
) -> dict[str, Any]:
    """Return what the ledger paid over the cycles (first and last, both counted) as `uids` and u16 `weights` of a subnet.

    `metagraph`: a JSON list of the subnet's hotkeys, in the order of their UIDs. Units of miners without a hotkey there are
    in `left_out`, by miner. Raises `Invalid` where no vector keeps to the subnet's limits, `VerificationFailed` for a ledger
    that does not add up.
    """
    _, book, wrong = runs.book_of(run, folder, data_dir)
    if wrong:
        raise VerificationFailed(f"the ledger of {run} does not add up: {'; '.join(wrong)}; there are no weights")
    hotkeys, uids = read(bindings), _uids(metagraph)
    units: dict[int, int] = {}
    left_out = {}
    for miner, amount in earned(book, *cycles).items():
        uid = uids.get(hotkeys.get(miner, ""))
        if uid is None:
            left_out[miner] = amount
        else:
            units[uid] = units.get(uid, 0) + amount
    made = vector(units, max_weight, min_allowed)
    document = {"run": run, "first": cycles[0], "last": cycles[1], "uids": [*made], "weights": [*made.values()]}
    return {**document, "units": [units[uid] for uid in made], "left_out": left_out}


def _uids(metagraph: Path) -> dict[str, int]:
    hotkeys = _json(metagraph)
    if not isinstance(hotkeys, list) or not all(isinstance(one, str) and one for one in hotkeys):
        raise Invalid(f"{metagraph} is no JSON list of hotkeys in the order of their UIDs")
    uids = {hotkey: uid for uid, hotkey in enumerate(hotkeys)}
    if len(uids) != len(hotkeys):
        raise Invalid(f"{metagraph} names a hotkey twice; each has one UID")
    return uids


def _json(file: Path) -> Any:
    try:
        if file.stat().st_size > _LIMIT:
            raise ValueError(f"it has more than {_LIMIT} bytes")
        return json.loads(file.read_bytes())
    except OSError as error:
        raise NotFound(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{file} is no JSON: {error}") from error


def _verified(hotkey: str, message: bytes, signature: bytes) -> bool:
    with extras_named():
        from bittensor_wallet import Keypair
    try:
        key = Keypair(ss58_address=hotkey)
    except (ValueError, TypeError) as error:
        raise Invalid(f"{str(hotkey)[:60]!r} is no ss58 address: {error}") from error
    try:
        return bool(key.verify(message, signature))
    except (ValueError, TypeError):
        return False
