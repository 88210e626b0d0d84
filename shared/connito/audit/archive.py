"""A run in one file: its messages as the broker stored them, and every artifact that they name (ADR 24).

A ZIP file without compression, so that any tool lists it and one artifact is read without the rest. The same log and the same
objects give the same bytes. Nothing in it is taken on trust: messages carry their signatures, artifacts are hashed when read.
"""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from connito.audit.artifacts import Artifacts, Named, gather
from connito.audit.evidence import Evidence, Stored, read_stored
from connito.data.documents import parse_json
from connito.errors import Invalid, NotFound, Retry, VerificationFailed
from connito.files import replacing
from connito.runtime.progress import Notify, silent
from connito.store.named import key_of
from connito.store.presigned import save_verified
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.fact import Record
from connito.wire.identity import Identity
from connito.wire.roster import Roster

FORMAT = 1
# Of every file in it: ZIP knows no time before this one, and the archive of a run does not depend on when it was written.
_TIME = (1980, 1, 1, 0, 0, 0)
_ABOUT, _ROSTER, _LOG = "archive.json", "roster.json", "log.jsonl"
_LISTS = ("records", "dead_letters", "library")
# The broker counts in 64 bits, and the calendar ends with the year 9999.
_LAST_SEQUENCE, _LAST_MS = 1 << 63, 253_402_300_800_000


@dataclass(frozen=True)
class Archive:
    """An archive that is open, with the methods of `Access` that an audit needs. `folder` takes what is unpacked."""

    path: Path
    zip: zipfile.ZipFile
    folder: Path
    run: str
    roster: Roster
    me: Identity | None = None

    async def evidence(self, run: str) -> Evidence:
        """Verify the messages of the run. Raises `NotFound` for another run than the one that is in it."""
        if run != self.run:
            raise NotFound(f"{self.path} is the archive of {self.run!r}, not of {run!r}")
        return read_stored(run, self.stored(), self.roster)

    def stored(self) -> Stored:
        """Return the messages as the broker stored them. Raises `Invalid` for a log that is none."""
        lists: dict[str, list[Record]] = {name: [] for name in _LISTS}
        with _reading(self.path), self.zip.open(_LOG) as lines:
            for line in lines:
                row = parse_json(line)
                lists[row["list"]].append(_record(row))
        return Stored(*(lists[name] for name in _LISTS))

    async def artifacts(self, evidence: Evidence, wanted: Callable[[Named], bool], say: Notify) -> Artifacts:
        """Unpack and hash the artifacts that the log names and that are `wanted`."""
        return await gather(evidence, self, wanted=wanted, me=self.me, say=say)

    async def fetch(self, ref: ArtifactRef) -> Path:
        """Unpack an artifact. Raises `NotFound`, `VerificationFailed`. A size of 0 stands for any."""
        path = self.folder / key_of(ref).replace("/", "-")
        try:
            member = self.zip.getinfo(key_of(ref))
        except KeyError:
            raise NotFound("is not in the archive") from None
        if ref.size not in (0, member.file_size):
            raise VerificationFailed(f"has {member.file_size} bytes in the archive; the log says {ref.size}")
        whole = ArtifactRef(digest=ref.digest, size=member.file_size, realm=ref.realm)
        try:
            with _reading(self.path), self.zip.open(member) as file:
                save_verified(file.read, whole, path)
        except (Invalid, Retry) as error:
            raise VerificationFailed("does not have this digest in the archive") from error
        return path


def _record(row: dict[str, Any]) -> Record:
    """Return the message of a line. Raises as `_reading` expects for one that no broker stored."""
    stream, subject, sequence, ms = (row[name] for name in ("stream", "subject", "sequence", "ms"))
    words = isinstance(stream, str) and isinstance(subject, str)
    if not (words and type(sequence) is type(ms) is int and 0 < sequence < _LAST_SEQUENCE and 0 <= ms < _LAST_MS):
        raise ValueError("a message has no place in a stream")
    return Record(stream, sequence, subject, base64.b64decode(row["data"], validate=True), ms)


@contextmanager
def unsealed(path: Path, folder: Path, me: Identity | None = None) -> Iterator[Archive]:
    """Open an archive; `folder` takes what is unpacked, `me` reads what is sealed.

    Raises `Invalid` for a file that is none, or of a newer format.
    """
    with _reading(path), zipfile.ZipFile(path) as file:
        # What is only as long as it lies there fills no memory and no disk.
        if any(member.compress_type != zipfile.ZIP_STORED for member in file.infolist()):
            raise ValueError("something in it is compressed")
        about = parse_json(file.read(_ABOUT))
        if about["format"] != FORMAT:
            raise Invalid(f"{path} has format {about['format']}; this program reads {FORMAT}: use a newer one")
        roster = folder / _ROSTER
        roster.write_bytes(file.read(_ROSTER))
        archive = Archive(path, file, folder, str(about["run"]), Roster.load(roster))
    with zipfile.ZipFile(path) as file:
        yield Archive(path, file, folder, archive.run, archive.roster, me)


def seal(
    path: Path, run: str, stored: Stored, roster: Roster, objects: Mapping[str, Path], say: Notify = silent
) -> int:
    """Write the archive of a run, all of it or nothing, synced; return its size in bytes. `objects`: files by their key."""
    try:
        with replacing(path) as draft, zipfile.ZipFile(_own(draft), "w", zipfile.ZIP_STORED) as out:
            about = {"format": FORMAT, "run": run, "messages": len(stored.records), "objects": len(objects)}
            _add(out, _ABOUT, [json.dumps(about, sort_keys=True).encode()])
            _add(out, _ROSTER, [roster.to_json().encode()])
            _add(out, _LOG, _lines(stored))
            for number, key in enumerate(sorted(objects), 1):
                say(f"object {number} of {len(objects)}")
                with objects[key].open("rb") as source:
                    _add(out, key, iter(lambda source=source: source.read(1 << 20), b""))  # type: ignore[misc]
    except OSError as error:
        raise Invalid(f"cannot write {path}: {error.strerror}") from error
    return path.stat().st_size


def _own(draft: Path) -> Path:
    """Return a file for nobody else: what lay encrypted in the store is in clear in an archive."""
    draft.touch(0o600)
    return draft


def _lines(stored: Stored) -> Iterator[bytes]:
    for name in _LISTS:
        for record in sorted(getattr(stored, name), key=lambda record: (record.stream, record.sequence)):
            row = {
                "list": name, "stream": record.stream, "sequence": record.sequence, "subject": record.subject,
                "ms": record.time_unix_ms, "data": base64.b64encode(record.data).decode(),
            }  # fmt: skip
            yield json.dumps(row, sort_keys=True).encode() + b"\n"


def _add(out: zipfile.ZipFile, name: str, chunks: Iterable[bytes]) -> None:
    info = zipfile.ZipInfo(name, _TIME)
    info.external_attr = 0o600 << 16
    with out.open(info, "w", force_zip64=True) as member:
        _write(member, chunks)


def _write(member: IO[bytes], chunks: Iterable[bytes]) -> None:
    for chunk in chunks:
        member.write(chunk)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in one sentence what a damaged archive, or another file, is."""
    try:
        yield
    except FileNotFoundError:
        raise NotFound(f"there is no {path}") from None
    except (
        zipfile.BadZipFile,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise Invalid(f"{path} is not a whole archive of a run ({error}); `connito archive` writes one") from error
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror or error}") from error
