"""A run's ledger as a file for whoever pays: CSV or Parquet, with a detached signature beside it.

The signature is ed25519 of the exporter's key over two lines of text, so that any program can check it:

    connito.v1 payouts
    SHA-256 of the file, in hexadecimal

`FILE.sig` is a JSON object of `signer` (the nkey `U…`), `sha256` and `signature` (hexadecimal).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

from connito.client import runs
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.files import write_durably
from connito.platform.datadir import DataDir
from connito.wire.identity import Identity, verify_text

# Without labels: what a miner calls itself could be a formula to a spreadsheet.
COLUMNS = ("run", "cycle", "role", "account", "units", "balance", "why", "sequence")
WHOLE = ("cycle", "units", "balance", "sequence")


def export(
    run: str, file: Path, key: Path | None = None, folder: Path | None = None, data_dir: Path | None = None
) -> dict[str, Any]:
    """Write what every cycle of a run paid to whom to `file` (`.csv` or `.parquet`), and its signature to `file`.sig.

    `key`: the file of the key that signs, else that of the environment, or the customer's of the platform or folder.
    `folder`: what an ended `connito up` left, or an archive. Raises `Invalid` for another ending, `NotFound` for a run that
    is not there, `VerificationFailed` for a ledger that does not add up; then nothing is written.
    """
    writers = {".csv": _csv, ".parquet": _parquet}
    if file.suffix not in writers:
        raise Invalid(f"{file} has to end in {' or '.join(writers)}")
    if not file.parent.is_dir():
        raise NotFound(f"there is no folder {file.parent}; make it first")
    document, wrong = runs.ledger(run, "", folder, data_dir)
    if wrong:
        raise VerificationFailed(f"the ledger of {run} does not add up: {'; '.join(wrong)}; nothing was written")
    identity = Identity.load(key or _own_key(folder, data_dir))
    rows = [{"run": run, **entry} for entry in document["entries"]]
    content = writers[file.suffix](rows)
    digest = hashlib.sha256(content).hexdigest()
    note = {"signer": identity.public, "sha256": digest, "signature": identity.sign_text(_text(digest)).hex()}
    write_durably(file, content)
    write_durably(signature_of(file), json.dumps(note, indent=2) + "\n")
    return {"run": run, "file": str(file), "signature": str(signature_of(file)), "rows": len(rows), **note}


def verify(file: Path, by: str = "") -> dict[str, Any]:
    """Return who signed a file's bytes, and their digest. `by`: the only key that may have.

    Raises `NotFound` for a missing file, `Invalid` for a note that is none, `VerificationFailed` for other bytes or keys.
    """
    digest = hashlib.sha256(_read(file)).hexdigest()
    try:
        note = json.loads(_read(signature_of(file)))
        signer, signature = str(note["signer"]), bytes.fromhex(note["signature"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Invalid(f"{signature_of(file)} is no signature of an export; ask the exporter for it again") from error
    if not verify_text(signer, _text(digest), signature):
        raise VerificationFailed(
            f"{file} is not what {signer[:60]} signed; ask the exporter for file and signature again"
        )
    if by and signer != by:
        raise VerificationFailed(f"{file} is signed by {signer}, not by {by}")
    return {"file": str(file), "signer": signer, "sha256": digest}


def signature_of(file: Path) -> Path:
    """Return where the signature of an export lies."""
    return file.with_name(f"{file.name}.sig")


def _own_key(folder: Path | None, data_dir: Path | None) -> Path:
    named = folder if folder is not None and folder.is_dir() else data_dir
    environment = os.environ.get("CONNITO_KEY_FILE") if named is None else None
    return Path(environment or DataDir.at(named).keys / "customer.nk")


def _text(digest: str) -> bytes:
    return f"connito.v1 payouts\n{digest}\n".encode()


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise NotFound(f"cannot read {file}: {error.strerror}") from error


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise Invalid("Parquet needs pyarrow: pip install 'connito[data]', or write a .csv") from error
    schema = pa.schema([(name, pa.uint64() if name in WHOLE else pa.string()) for name in COLUMNS])
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink)
    return bytes(sink.getvalue())
