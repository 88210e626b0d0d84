"""Attestation of an expert: the aggregator's signature on its state and the library's on its deposit, for offline checks.

An attestation is JSON: the two signed envelopes as they stand in the log with the subjects they were signed for, and the
head of the state file that the aggregator signed the digest of. The expert file holds that state's tensors under a header
of its own; with the old head in front, its data must hash to what was signed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connito.data.documents import parse_json
from connito.errors import ConnitoError, VerificationFailed
from connito.library.artifact import EXPERT_FILE, MODEL_FILE, RECORD_FILE, read_safetensors_header
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2, services_pb2
from connito.wire.envelope import MAX_WHOLE_BYTES, Opened, open_bytes
from connito.wire.identity import short_key
from connito.wire.roster import Roster
from connito.wire.subjects import LIBRARY

FORMAT = "connito-attestation/1"
ATTESTATION_FILE = "attestation.json"
DEPOSIT_SUBJECT = "rpc.DepositExpert"


def attest(version_subject: str, version: bytes, state: Path) -> dict[str, Any]:
    """Return the aggregator's part: its envelope on the final version, and the head of the state file that it names."""
    _, start = read_safetensors_header(state)
    with state.open("rb") as file:
        head = file.read(start)
    return {"format": FORMAT, "aggregator": _entry(version_subject, version), "state_head": _text(head)}


def attest_derived(envelope: bytes) -> dict[str, Any]:
    """Return the part of whoever derived an expert from others: the signed envelope with which it was deposited."""
    return {"format": FORMAT, "depositor": _entry(DEPOSIT_SUBJECT, envelope)}


def encode(attestation: Mapping[str, Any]) -> bytes:
    """Return an attestation's bytes: sorted keys, so that its digest depends on its content alone."""
    return json.dumps(attestation, sort_keys=True).encode()


def countersign(attestation: Mapping[str, Any], subject: str, deposited: bytes) -> dict[str, Any]:
    """Return the whole: with the library's envelope on the deposit, which names record and file."""
    return {**attestation, "library": _entry(subject, deposited)}


def _entry(subject: str, envelope: bytes) -> dict[str, str]:
    return {"subject": subject, "envelope": _text(envelope)}


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def check_attestation(folder: Path, roster: Roster | None = None) -> list[str]:
    """Check the attestation in an expert's folder; returns what holds, in words. Needs no network.

    Without a `roster` it is shown who signed, not that they were entitled to. Raises `VerificationFailed`.
    """
    weights = folder / (EXPERT_FILE if (folder / EXPERT_FILE).is_file() else MODEL_FILE)
    try:
        attestation = parse_json((folder / ATTESTATION_FILE).read_bytes())
        library = _open(attestation["library"])
        deposit = library.read(run_pb2.ExpertDeposited)
        if _digest(folder / RECORD_FILE) != deposit.record.digest or _digest(weights) != deposit.expert.digest:
            raise _broken(f"record or weights in {folder} are not those that the library signed")
        derived = deposit.run == LIBRARY
        maker, said = _derived(attestation, deposit) if derived else _of_run(attestation, deposit, weights)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _broken(f"{folder / ATTESTATION_FILE} cannot be read: {error!r}") from error
    except VerificationFailed:
        raise
    except ConnitoError as error:
        raise _broken(f"a signature in {folder / ATTESTATION_FILE} does not hold: {error}") from error
    for role, opened in (("library", library), ("aggregator", maker)):
        if roster is not None and not (derived and role == "aggregator") and not roster.permits(role, opened.signer):
            raise _broken(f"{opened.signer} signed as the {role}, which the roster does not have")
    known = "" if roster is not None else "; no roster was given to check the key against"
    return [f"the library {_short(library)} signed the record and the file{known}", f"{said}{known}"]


def _of_run(attestation: Mapping[str, Any], deposit: run_pb2.ExpertDeposited, expert: Path) -> tuple[Opened, str]:
    """Return the aggregator's signature on what a run made, and what it says."""
    opened = _open(attestation["aggregator"])
    version = opened.read(cycle_pb2.VersionPublished)
    head = base64.b64decode(attestation["state_head"])
    if version.run != deposit.run or _state_digest(expert, head) != version.state.digest:
        raise _broken(f"the tensors in {expert} are not the state that the aggregator signed")
    return opened, (
        f"the aggregator {_short(opened)} signed their tensors as version {version.version} of run {version.run}"
    )


def _derived(attestation: Mapping[str, Any], deposit: run_pb2.ExpertDeposited) -> tuple[Opened, str]:
    """Return the signature of whoever derived an expert from others, and what it says."""
    opened = _open(attestation["depositor"])
    command = opened.read(services_pb2.DepositExpertCommand)
    if (command.expert, command.record, opened.signer) != (deposit.expert, deposit.record, deposit.owner):
        raise _broken("what was deposited is not what its owner signed")
    return opened, f"{_short(opened)}, who derived it, signed what it is made of and what was measured"


def _open(entry: Mapping[str, str]) -> Opened:
    return open_bytes(base64.b64decode(entry["envelope"]), entry["subject"], MAX_WHOLE_BYTES)


def _short(opened: Opened) -> str:
    return short_key(opened.signer)


def _state_digest(expert: Path, head: bytes) -> str:
    """Return SHA-256 of the state file: the old head, if it describes the same tensors, and the expert's data."""
    described, start = read_safetensors_header(expert)
    before = parse_json(head[8:])
    if {k: v for k, v in before.items() if k != "__metadata__"} != {
        k: v for k, v in described.items() if k != "__metadata__"
    }:
        return ""
    digest = hashlib.sha256(head)
    with expert.open("rb") as file:
        file.seek(start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _broken(what: str) -> VerificationFailed:
    return VerificationFailed(f"{what}; export the expert again", reason=reasons_pb2.REASON_DIGEST_MISMATCH)
