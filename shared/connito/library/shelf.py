"""A library in a folder: experts, a journal that only grows, and the index projected from it. Works without a platform.

`<shelf>/experts/<id>/` holds an export (expert file, record, card), `<shelf>/journal.jsonl` one event a line. The index
beside them can be deleted: it is built from the journal.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from connito.data.documents import parse_json
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.files import keep, sync
from connito.library.artifact import EXPERT_FILE, MODEL_FORMAT, RECORD_FILE, read_header
from connito.library.attestation import ATTESTATION_FILE
from connito.library.card import write_card
from connito.library.governance import governance
from connito.library.index import Index, LibraryEvent
from connito.library.record import encode
from connito.library.schema import ExpertRecord, read_record
from connito.v1 import reasons_pb2

JOURNAL = "journal.jsonl"
ORIGIN = "shelf"


class Shelf:
    """The library in `root`. Several processes may use one: the journal is written under a lock."""

    def __init__(self, root: Path) -> None:
        """Open the folder, creating it if it is missing."""
        self.root = root
        (root / "experts").mkdir(parents=True, exist_ok=True)
        (root / JOURNAL).touch()

    def events(self, after: int = 0) -> Iterator[LibraryEvent]:
        """Yield the journal from entry `after` + 1 on. Raises `VerificationFailed` for a damaged line."""
        with (self.root / JOURNAL).open("rb") as file:
            for number, line in enumerate(file, start=1):
                # What does not end is being written just now, or was when the power was cut.
                if number > after and line.endswith(b"\n"):
                    yield self._read(number, line)

    def _read(self, number: int, line: bytes) -> LibraryEvent:
        try:
            entry = parse_json(line)
            body = entry["body"]
            if entry["kind"] == "deposited":
                data = (self.path(entry["subject"]) / RECORD_FILE).read_bytes()
                if hashlib.sha256(data).hexdigest() != body["record"]:
                    raise VerificationFailed(
                        f"the record of {entry['subject']} is not the one that was deposited; restore it",
                        reason=reasons_pb2.REASON_DIGEST_MISMATCH,
                    )
                body = parse_json(data)
            return LibraryEvent(number, int(entry["at"]), entry["kind"], entry["subject"], body, ORIGIN)
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise VerificationFailed(
                f"entry {number} of {self.root / JOURNAL} cannot be read: {error!r}; restore the shelf from a copy"
            ) from error

    @contextmanager
    def index(self) -> Iterator[Index]:
        """Yield the index, up to date with the journal."""
        with Index(self.root / "index.sqlite") as index:
            index.apply(self.events(index.last_sequence(ORIGIN)))
            yield index

    def held(self) -> set[str]:
        """Return the experts that are on the shelf and in its journal: one whose entry was cut off is not found, and has to
        be deposited again."""
        with self.index() as index:
            return {str(name) for (name,) in index.select("SELECT expert_id FROM experts")}

    def path(self, expert_id: str) -> Path:
        """Return the folder of an expert, present or not. Raises `Invalid` for an id that is not a plain name."""
        if not expert_id or expert_id in (".", "..") or "/" in expert_id or "\\" in expert_id:
            raise Invalid(f"{expert_id!r} is not an expert id")
        return self.root / "experts" / expert_id

    def get(self, expert_id: str) -> tuple[Path, ExpertRecord]:
        """Return an expert's folder and record. Raises `NotFound`."""
        folder = self.path(expert_id)
        if not (folder / RECORD_FILE).is_file():
            raise NotFound(f"there is no expert {expert_id!r} on the shelf {self.root}; see `connito library search`")
        return folder, read_record((folder / RECORD_FILE).read_bytes(), folder / RECORD_FILE)

    def deposit(self, expert: Path, record: ExpertRecord, at_unix_ms: int, attestation: str | None = None) -> str:
        """Put an expert file, its record and the signatures behind it on the shelf; returns the id. The same expert twice
        is one entry. Without `attestation`, the one that lies beside the file is taken, where it is of this record.

        Raises `VerificationFailed` when file and record do not belong together.
        """
        check_expert(expert, record)
        governance(record)
        beside = expert.with_name(ATTESTATION_FILE)
        if attestation is None and beside.is_file():
            attestation = beside.read_text()

        def fill(folder: Path) -> None:
            shutil.copyfile(expert, folder / EXPERT_FILE)
            if attestation:
                (folder / ATTESTATION_FILE).write_text(attestation)
            write_card(record, folder)

        return self._place(str(record["expert_id"]), encode(record), fill, at_unix_ms)

    def deposit_model(
        self, folder: Path, at_unix_ms: int, record: ExpertRecord | None = None, attestation: str | None = None
    ) -> str:
        """Put a model made of experts, as pruning and extraction export it, on the shelf; returns the id. `record`: in place
        of the folder's own.

        Raises `VerificationFailed` for a folder whose files are not those of its record.
        """
        data = (folder / RECORD_FILE).read_bytes() if record is None else encode(record)
        record = read_record(data, folder / RECORD_FILE)
        if record["format"] != MODEL_FORMAT:
            raise Invalid(f"{folder} is not a model of the library: its record is {record['format']!r}")
        governance(record)
        for entry, described in record["files"].items():
            with (folder / entry).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != described["digest"]:
                    raise VerificationFailed(
                        f"{folder / entry} is not the file that was exported; export it again",
                        reason=reasons_pb2.REASON_DIGEST_MISMATCH,
                    )

        def fill(target: Path) -> None:
            for entry in record["files"]:
                shutil.copyfile(folder / entry, target / entry)
            if attestation:
                (target / ATTESTATION_FILE).write_text(attestation)

        return self._place(str(record["expert_id"]), data, fill, at_unix_ms)

    def _place(self, name: str, record: bytes, fill: Callable[[Path], None], at: int) -> str:
        """Add a folder with a record and what `fill` puts beside it, whole or not at all, unless it is there; returns `name`."""
        folder = self.path(name)
        with self._lock():
            placed = (folder / RECORD_FILE).is_file()
            if not placed:
                partial = folder.with_name(f".{name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                fill(partial)
                (partial / RECORD_FILE).write_bytes(record)
                for path in partial.iterdir():
                    sync(path)
                keep(partial, folder)
            if not placed or not self._entered(name):
                self._append("deposited", name, {"record": hashlib.sha256(record).hexdigest()}, at)
        return name

    def state(self, kind: str, subject: str, reason: str, at_unix_ms: int) -> None:
        """Deprecate, yank or restore an expert, or opt a data source out or in again; always with a reason."""
        if kind not in ("deprecated", "yanked", "restored", "opted-out", "opted-in"):
            raise Invalid(f"an expert cannot be {kind!r}; say deprecated, yanked, restored, opted-out or opted-in")
        if not reason.strip():
            raise Invalid("a reason is required: add --reason TEXT")
        if not kind.startswith("opted"):
            self.get(subject)
        with self._lock():
            self._append(kind, subject, {"reason": reason}, at_unix_ms)

    def meter(self, expert_id: str, verb: str, by: str, at_unix_ms: int, units: int = 1) -> None:
        """Write down one use."""
        with self._lock():
            self._append("used", expert_id, {"verb": verb, "by": by, "units": units}, at_unix_ms)

    def _entered(self, name: str) -> bool:
        """Return whether the journal knows the expert: whoever placed it may have been stopped before writing that down."""
        return any((event.kind, event.subject) == ("deposited", name) for event in self.events())

    def _append(self, kind: str, subject: str, body: Mapping[str, Any], at: int) -> None:
        line = json.dumps({"at": at, "kind": kind, "subject": subject, "body": body}, sort_keys=True)
        with (self.root / JOURNAL).open("r+b") as file:
            # An entry that was cut off was never acknowledged.
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.root / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def check_expert(expert: Path, record: ExpertRecord) -> None:
    """Raise `VerificationFailed` unless the file is the one its record describes: digest, base, domain and rows."""
    with expert.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    header = read_header(expert)
    layers = {int(layer): list(experts) for layer, experts in record["selection"]["layers"].items()}
    claims = {
        "digest": (digest, record["expert"]["digest"]),
        "base": (header.base_digest, record["base"]["manifest"]),
        "domain": (header.domain, record["domain"]),
        "rows": (header.layers, layers),
    }
    for what, (actual, claimed) in claims.items():
        if actual != claimed:
            raise VerificationFailed(
                f"{expert} and its record disagree about the {what}: {str(actual)[:40]} against {str(claimed)[:40]}; "
                "get both again from one place",
                reason=reasons_pb2.REASON_DIGEST_MISMATCH,
            )
