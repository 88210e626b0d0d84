"""What lies on disk is its owner's alone: held-out text and hand-ins are in the caches."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from connito.platform.datadir import DataDir
from connito.store.cache import Cache
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, ArtifactRef

TEXT = b"held-out text of a clinic"
REF = ArtifactRef(digest=hashlib.sha256(TEXT).hexdigest(), size=len(TEXT), realm=REALM_HOLDOUT)


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """As a shell has it; what a test can see of privacy must not come from the machine that it runs on."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_to_others(folder: Path) -> list[str]:
    """Files that somebody else on this machine could read: every folder above them lets others pass."""
    found = []
    for path in folder.rglob("*"):
        ways = [folder, *(parent for parent in path.parents if folder in parent.parents), path]
        if path.is_file() and all(way.stat().st_mode & (0o044 if way == path else 0o011) for way in ways):
            found.append(str(path.relative_to(folder)))
    return found


def test_the_cache_is_its_owners_alone(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)

    def download(target: Path) -> None:
        target.write_bytes(TEXT)

    path = Cache(tmp_path / "cache").get(REF, download)
    assert path.read_bytes() == TEXT
    assert path.stat().st_mode & 0o777 == 0o400
    assert open_to_others(tmp_path) == []


def test_a_link_keeps_the_mode_of_the_file_that_it_is_of(tmp_path: Path) -> None:
    source = tmp_path / "weights"
    source.write_bytes(TEXT)
    source.chmod(0o444)
    Cache(tmp_path / "cache").get(REF, lambda target: os.link(source, target))
    assert source.stat().st_mode & 0o777 == 0o444


def test_a_data_directory_is_made_private_and_an_old_one_closed(tmp_path: Path) -> None:
    assert DataDir.open(tmp_path / "new").root.stat().st_mode & 0o777 == 0o700
    old = tmp_path / "old"
    for name in ("objects", "cache", "own"):
        (old / name).mkdir(parents=True)
        (old / name / "file").write_bytes(TEXT)
    assert len(open_to_others(old)) == 3
    DataDir.open(old).close_to_others()
    assert open_to_others(old) == ["own/file"], "and nothing that is not ours is touched"
