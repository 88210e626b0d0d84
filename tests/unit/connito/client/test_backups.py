"""A backup that somebody changed: nothing beside it is read, and every fault is a sentence."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from connito.bus import Bus
from connito.client import backups
from connito.errors import Invalid, VerificationFailed
from connito.runtime.tasks import blocking
from connito.store import ArtifactStore

SHA = hashlib.sha256(b"secret").hexdigest()
STREAM = {
    "file": "streams-20310101T000000.0/RUNS.snapshot",
    "sha256": SHA,
    "last_sequence": 1,
    "copied": {"config": {"num_replicas": 1}, "state": {}},
}
WHOLE: dict[str, Any] = {
    "format": 1,
    "at": "2031-01-01T00:00:00Z",
    "streams": {"RUNS": STREAM},
    "objects": {f"public/sha256/{SHA}": "text/plain"},
}


class Store:
    """A store that takes nothing, and remembers what it was given."""

    def __init__(self) -> None:
        self.given: list[Path] = []

    async def ensure_bucket(self) -> None: ...

    async def put_file(self, path: Path, *_: object) -> None:
        self.given.append(path)


def linked(folder: Path) -> dict[str, Any]:
    """An object that is a link to a file of whoever brings the backup back."""
    (folder / "objects/public/sha256").mkdir(parents=True)
    (folder / f"objects/public/sha256/{SHA}").symlink_to(folder.parent / "secret")
    return WHOLE


CHANGED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "a link": linked,
    "a path": lambda folder: {**WHOLE, "objects": {f"public/../../../{SHA}": "text/plain"}},
    "an absolute path": lambda folder: {**WHOLE, "objects": {f"{folder.parent}/{SHA}": "text/plain"}},
    "no realm": lambda folder: {**WHOLE, "objects": {f"private/sha256/{SHA}": "text/plain"}},
    "a control character": lambda folder: {**WHOLE, "objects": {f"public/sha256/{SHA}\n": "text/plain"}},
    "a stream elsewhere": lambda folder: {**WHOLE, "streams": {"RUNS": {**STREAM, "file": "../secret"}}},
    "a stream that is none": lambda folder: {**WHOLE, "streams": {"ELSE": {**STREAM, "file": "streams-1/ELSE.snapshot"}}},
    "a bucket": lambda folder: {**WHOLE, "streams": {"KV_LEASES": STREAM}},
    "a file elsewhere": lambda folder: {**WHOLE, "files": {"../secret": SHA}},
    "a key": lambda folder: {**WHOLE, "files": {"keys/operator.nk": SHA}},
    "a file out of the shelf": lambda folder: {**WHOLE, "files": {"shelf/experts/a/../../../../secret": SHA}},
    "an absolute file": lambda folder: {**WHOLE, "files": {f"{folder.parent}/secret": SHA}},
    "no streams": lambda folder: {**WHOLE, "streams": {}},
    "no replicas": lambda folder: {
        **WHOLE,
        "streams": {"RUNS": {**STREAM, "copied": {"config": {}, "state": {}}}},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", CHANGED)
def test_nothing_beside_a_backup_is_read(kind: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / SHA).write_bytes(b"secret")
    folder, store = tmp_path / "backup", Store()
    folder.mkdir()
    (folder / backups.CONTENTS).write_text(json.dumps(CHANGED[kind](folder)))
    with pytest.raises(VerificationFailed, match=r"backup\.json is damaged, or somebody changed it"):
        blocking(backups.load(cast(Bus, None), cast(ArtifactStore, store), folder))
    assert store.given == []


@pytest.mark.parametrize("data", [b"", b"[" * 100_000, b"\xff", b'{"format": 1e400}', b"null"])
def test_what_is_no_list_of_contents_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / backups.CONTENTS).write_bytes(data)
    with pytest.raises((VerificationFailed, Invalid), match="damaged or of another version"):
        blocking(backups.load(cast(Bus, None), cast(ArtifactStore, Store()), tmp_path))


def test_every_file_that_a_shelf_may_hold_can_be_brought_back(tmp_path: Path) -> None:
    """Files of a model are called what its record says: with spaces too."""
    root, folder = tmp_path / "data", tmp_path / "backup"
    expert = root / "shelf/experts/law-1"
    expert.mkdir(parents=True)
    for name in ("model part 1.safetensors", "بيان", "record.json"):
        (expert / name).write_text(name)
    (root / "begun.json").write_text("{}")
    files = backups._save_files(root, folder / "files")
    assert len(files) == 4
    contents = {**WHOLE, "files": files}
    (folder / backups.CONTENTS).write_text(json.dumps(contents))
    assert backups._contents(folder).files == files


def test_what_ends_meanwhile_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "data"
    root.mkdir()
    (root / "begun.json").write_text("{}")
    (root / "threads").write_text("1")
    copy = shutil.copyfile

    def ends(source: Path, target: Path) -> None:
        (root / "begun.json").unlink(missing_ok=True)
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", ends)
    assert list(backups._save_files(root, tmp_path / "files")) == ["threads"]
    assert not list((tmp_path / "files").glob("begun.json*"))
