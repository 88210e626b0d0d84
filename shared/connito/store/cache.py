"""The local cache: one file per artifact, shared by every process of the machine, verified whenever it is handed out."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from connito.runtime import metrics
from connito.store.eviction import PASSING, USED, make_room
from connito.store.presigned import disk_or_network
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef


def digest_of_file(path: Path) -> tuple[str, int]:
    """Return lower-case hex SHA-256 and size of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return digest.hexdigest(), file.tell()


class Cache:
    """`<folder>/<first two digits>/<digest>`. A file is hashed each time it is asked for, because a disk may return other
    bytes than it was given under the same size and time; one that is wrong is fetched again.
    """

    def __init__(self, folder: Path, max_bytes: int = 0) -> None:
        """Keep at most `max_bytes`; 0 stands for what leaves some of the disk free."""
        self.folder, self.max_bytes = folder, max_bytes

    def path(self, ref: ArtifactRef) -> Path:
        """Return the path of the artifact, cached or not."""
        return self.folder / "sha256" / ref.digest[:2] / ref.digest

    def get(self, ref: ArtifactRef, download: Callable[[Path], None]) -> Path:
        """Return the verified file. `download` (into the path given, verifying) runs in at most one process at a time."""
        path = self.path(ref)
        if self._holds(path, ref):
            return path
        try:
            self._make(path.parent)
            with _locked(path.with_name(path.name + ".lock")):
                self._fill(path, ref, download)
        except OSError as error:
            raise disk_or_network(error, path, f"filling the cache with {ref.digest[:12]}…") from error
        return path

    def adopt(self, source: Path, ref: ArtifactRef) -> Path:
        """Put a file whose digest was just computed into the cache, without copying it where the disk allows."""

        def link(target: Path) -> None:
            # A hard link would let a later write to `source` change the cache; a private copy cannot.
            shutil.copyfile(source, target)

        return self.get(ref, link)

    def _fill(self, path: Path, ref: ArtifactRef, download: Callable[[Path], None]) -> None:
        if self._holds(path, ref):
            return
        metrics.CACHE.labels("corrupt" if path.exists() else "miss").inc()
        # Whoever holds the lock is alone: every other draft is of a process that was killed.
        for left in (path, *path.parent.glob(f"{path.name}.part*")):
            left.unlink(missing_ok=True)
        make_room(self.folder, ref.size, self.max_bytes)
        if ref.realm == REALM_SUBMISSION:
            path.with_name(path.name + PASSING).touch()
        partial = path.with_name(f"{path.name}.part{os.getpid()}")
        try:
            download(partial)
            if partial.stat().st_nlink == 1:  # Else it is a link to a file of somebody's own.
                partial.chmod(0o400)
            # Not synced: what a power cut takes of it is noticed when it is next asked for.
            partial.replace(path)
            path.with_name(path.name + USED).touch()
        finally:
            partial.unlink(missing_ok=True)

    def _make(self, folder: Path) -> None:
        """Make a folder of the cache, which only its owner may enter: held-out text and hand-ins lie in it."""
        top = self.folder / "sha256"
        if not top.is_dir():
            top.mkdir(parents=True, exist_ok=True)
            top.chmod(0o700)
        folder.mkdir(exist_ok=True, mode=0o700)

    def _holds(self, path: Path, ref: ArtifactRef) -> bool:
        try:
            if path.stat().st_size != ref.size or digest_of_file(path)[0] != ref.digest:
                return False
        except OSError:
            return False
        with suppress(OSError):  # A full disk is no reason to fetch again.
            # Its mark's time is when the file was last asked for; what was longest ago is evicted first.
            path.with_name(path.name + USED).touch()
        metrics.CACHE.labels("hit").inc()
        return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock, and leave no file; the kernel drops it if this process dies."""
    while (descriptor := _lock(path)) is None:
        pass
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Wait for a file's lock and return its descriptor; None where whoever held it has removed the file."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with suppress(FileNotFoundError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Somebody may hold another one of that name by now.
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor
    os.close(descriptor)
    return None
