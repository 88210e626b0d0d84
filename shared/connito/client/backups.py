"""Copy streams and objects of a platform into a folder, and make a platform again from them; of one that `connito up` has in a
folder also its shelf, and what it goes on with.

Streams first, then objects: what the log names was stored before it was named, so it is there when it is copied. Back the
other way round: objects first, so that no service reads of one that is not there yet.
"""

from __future__ import annotations

import asyncio
import datetime
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from connito.bus import Bus, snapshots, streams
from connito.bus.snapshots import Copied
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.files import replacing, write_durably
from connito.platform.datadir import DataDir
from connito.platform.session import Session
from connito.render import formats
from connito.runtime.progress import Notify, silent
from connito.runtime.tasks import blocking
from connito.store import ArtifactStore
from connito.store.cache import digest_of_file
from connito.store.named import KEYS, PRIVATE, StoredObject, ref_of_key
from connito.wire.private import whole

T = TypeVar("T")

FORMAT = 1
CONTENTS = "backup.json"
AT_ONCE = 8
_SNAPSHOT = re.compile(r"streams-[0-9T.]+/[A-Z]+\.snapshot")
_FILE = re.compile(r"files/(begun\.json|threads|shelf/journal\.jsonl|shelf/experts/[^./][^/]*(/[^/]+)+)")
_OBJECT = re.compile(rf"objects/{KEYS}")
# Of the folder of `connito up`: the run that it goes on with, threads of a computation, the shelf. Its journal comes before the
# experts, which are there before the journal names them.
FILES = ("begun.json", "threads", "shelf/journal.jsonl", "shelf/experts/[!.]*/**/*")


@dataclass(frozen=True)
class SavedStream:
    """A stream in a backup: its file, what the broker says of it, and the sequence up to which it counts."""

    file: str
    sha256: str
    last_sequence: int
    copied: Copied


@dataclass(frozen=True)
class Backup:
    """Contents of a folder. `at`: the broker's clock at the cut. `objects`: media types by key; each key ends in a SHA-256.
    `files`: SHA-256 by path in the folder of `connito up`.
    """

    format: int
    at: datetime.datetime
    streams: dict[str, SavedStream]
    objects: dict[str, str]
    files: dict[str, str] = field(default_factory=dict)


_FORM = TypeAdapter(Backup)


def backup(session: Session, folder: Path, *, say: Notify = silent) -> Backup:
    """Copy streams and objects of a platform, running or not, into `folder`; objects that are there from before are not read
    again. For the operator.

    Raises `Invalid` where the folder cannot be written, `Retry` while broker or store are away or the log is never still.
    """

    async def work() -> Backup:
        async with session.bus() as bus:
            return await save(bus, session.store(), folder, say, session.data)

    return blocking(work())


def recover(session: Session, folder: Path, *, replicas: int = 0, say: Notify = silent) -> Backup:
    """Make streams and objects of a platform again from `folder`, before its services start. For the operator.

    `replicas`: copies of each stream, as many as it had for 0. Raises `NotFound` where the folder holds no backup,
    `VerificationFailed` where it is damaged, `Invalid` where the broker is not empty; then nothing was changed in the broker.
    """

    async def work() -> Backup:
        async with session.bus() as bus:
            return await load(bus, session.store(), folder, replicas, say, session.data)

    return blocking(work())


async def save(
    bus: Bus, store: ArtifactStore, folder: Path, say: Notify = silent, data: DataDir | None = None
) -> Backup:
    """Do what `backup` does, over connections that there are."""
    at = datetime.datetime.fromtimestamp(await bus.time(), datetime.UTC)
    ends = await snapshots.consistent_cut(bus)
    place = f"streams-{at:%Y%m%dT%H%M%S.%f}"
    try:
        (folder / place).mkdir(parents=True, mode=0o700)
    except OSError as error:
        raise Invalid(f"cannot write a backup into {folder}: {error.strerror}") from error
    saved = {}
    for name, last in ends.items():
        say(f"copying stream {name}, {formats.count(last, 'message')}")
        file = folder / place / f"{name}.snapshot"
        copied = await snapshots.save(bus, name, file)
        saved[name] = SavedStream(f"{place}/{name}.snapshot", digest_of_file(file)[0], last, copied)
    files = {} if data is None else _save_files(data.root, folder / "files")
    done = Backup(FORMAT, at, saved, await _save_objects(store, folder / "objects", say), files)
    write_durably(folder / CONTENTS, _FORM.dump_json(done, indent=1) + b"\n", 0o600)
    for earlier in folder.glob("streams-*"):
        if earlier.name != place:
            shutil.rmtree(earlier)
    return done


def _save_files(root: Path, folder: Path) -> dict[str, str]:
    kept = {}
    for source in (source for pattern in FILES for source in sorted(root.glob(pattern)) if source.is_file()):
        name = source.relative_to(root).as_posix()
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with replacing(target) as draft:
                shutil.copyfile(source, draft)
        except FileNotFoundError:
            continue  # A run has just ended, and there is nothing to go on with.
        kept[name] = digest_of_file(target)[0]
    return kept


async def _save_objects(store: ArtifactStore, folder: Path, say: Notify) -> dict[str, str]:
    known = _contents(folder.parent).objects if (folder.parent / CONTENTS).exists() else {}
    kept: dict[str, str] = {}

    async def take(one: StoredObject) -> None:
        file = folder / one.key
        if one.key in known and file.is_file() and file.stat().st_size == one.size:
            kept[one.key] = known[one.key]
            return
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(file) as draft:
            media_type = await store.copy(one, draft)
            if media_type is None:
                draft.touch()  # removed since; nothing that is kept names it
                return
        kept[one.key] = media_type

    objects = await store.objects()
    for number, some in _some(objects):
        say(f"copying object {number} of {len(objects)}")
        await asyncio.gather(*map(take, some))
    return dict(sorted(kept.items()))


async def load(
    bus: Bus, store: ArtifactStore, folder: Path, replicas: int = 0, say: Notify = silent, data: DataDir | None = None
) -> Backup:
    """Do what `recover` does, over connections that there are."""
    found = _contents(folder)
    for name, saved in found.streams.items():
        say(f"checking stream {name}")
        _check(folder / saved.file, saved.sha256)
    for name, sha256 in found.files.items():
        _check(folder / "files" / name, sha256)
    await store.ensure_bucket()
    for number, some in _some([*found.objects]):
        say(f"storing object {number} of {len(found.objects)}")
        await asyncio.gather(*(_store(store, folder / "objects", key, found.objects[key]) for key in some))
    await snapshots.make_room(bus, [*found.streams])
    for name, saved in found.streams.items():
        say(f"restoring stream {name}, {formats.count(saved.last_sequence, 'message')}")
        await snapshots.load(bus, name, folder / saved.file, saved.copied, saved.last_sequence, replicas)
    await streams.ensure(bus.js, replicas or next(iter(found.streams.values())).copied.config["num_replicas"])
    if data is not None:
        _load_files(found, folder / "files", data.root)
    return found


def _load_files(found: Backup, folder: Path, root: Path) -> None:
    """Put files where none are; what a folder has of its own stays."""
    for name in found.files:
        if not (root / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(root / name) as draft:
                shutil.copyfile(folder / name, draft)


async def _store(store: ArtifactStore, folder: Path, key: str, media_type: str) -> None:
    ref = ref_of_key(key, 0)
    if ref.realm != PRIVATE:
        _check(folder / key, ref.digest)
        await store.put_file(folder / key, media_type, ref.realm, anew=True)
        return
    with (folder / key).open("rb") as file:
        if not whole(file.read):
            raise _broken(folder / key)
    await store.put_copy(folder / key, key, media_type)


def _contents(folder: Path) -> Backup:
    try:
        found = _FORM.validate_json((folder / CONTENTS).read_bytes())
    except FileNotFoundError as error:
        raise NotFound(f"{folder} holds no backup: {CONTENTS} is missing, which is written last") from error
    except (ValidationError, OSError) as error:
        raise VerificationFailed(f"{folder / CONTENTS} is damaged or of another version") from error
    if found.format != FORMAT:
        raise Invalid(f"{folder} is a backup of format {found.format}; this version reads {FORMAT}")
    if odd := next(_odd(found, folder), ""):
        raise VerificationFailed(f"{folder / CONTENTS} is damaged, or somebody changed it: {odd}")
    return found


def _odd(found: Backup, folder: Path) -> Iterator[str]:
    """Yield what no backup has: whoever brings one back reads and stores what it names, and nothing beside it."""
    if not found.streams:
        yield "it has no streams"
    files = [
        *((saved.file, _SNAPSHOT) for saved in found.streams.values()),
        *((f"objects/{key}", _OBJECT) for key in found.objects),
        *((f"files/{name}", _FILE) for name in found.files),
    ]
    for file, form in files:
        if not form.fullmatch(file) or ".." in PurePosixPath(file).parts:
            yield f"{file[:100]!r} cannot be in it"
        if not (folder / file).resolve().is_relative_to(folder.resolve()):
            yield f"{file[:100]!r} leads out of it"
    for name, saved in found.streams.items():
        if name not in streams.STREAMS or not isinstance(saved.copied.config.get("num_replicas"), int):
            yield f"{name[:100]!r} is no stream"


def _check(file: Path, sha256: str) -> None:
    if not file.is_file():
        raise VerificationFailed(f"the backup lacks {file}; bring back another copy of it")
    if digest_of_file(file)[0] != sha256:
        raise _broken(file, f": its SHA-256 is not {sha256}")


def _broken(file: Path, why: str = "") -> VerificationFailed:
    return VerificationFailed(f"{file} is damaged{why}; bring back another copy of it")


def _some(everything: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    for start in range(0, len(everything), AT_ONCE):
        yield start + 1, everything[start : start + AT_ONCE]
