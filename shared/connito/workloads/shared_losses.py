"""Losses that the validators of one owner on one machine measure once: a file for each state and each part of a draw.

Who may write into the folder may say what anything is worth, so it is the owner's alone or it is not used at all. A value is
found under the hash of all that it follows from, and carries a checksum: what a power cut left of it is measured again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from connito.data.packing import Rows
from connito.protocol.scoring.evaluation import Losses
from connito.runtime.logs import get_logger
from connito.wire.hashing import hash_fields

log = get_logger("measuring")

TAG = b"connito.shared-losses"
_DIGEST = hashlib.sha256().digest_size


class SharedLosses:
    """Losses of one run. `judge` names the model and how it computes, to the last bit.

    `of` waits for whoever measures the same state just then, and measures where nobody has.
    """

    def __init__(self, folder: Path | None, run: str, *judge: str) -> None:
        self._folder = None if folder is None else _own(folder / run)
        self._judge = judge

    def of(self, state: str, rows: Rows, measure: Callable[[], Losses]) -> Losses:
        """Return the losses of a state on rows [n, L + 1]. `state` is named by its digests; without a name it is not shared."""
        if self._folder is None or not state:
            return measure()
        content = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        path = self._folder / hash_fields(TAG, *self._judge, state, str(rows.dtype), len(rows), content).hex()
        try:
            return self._known(path, len(rows), measure)
        except OSError as error:
            log.warning("losses cannot be shared", folder=str(self._folder), error=str(error))
            self._folder = None
        return measure()

    def close(self) -> None:
        """Let go of what is known, once nobody will ask again."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _known(self, path: Path, count: int, measure: Callable[[], Losses]) -> Losses:
        found = _read(path, count)
        if found is not None:
            return found
        with _alone(path.with_suffix(".lock")):
            found = _read(path, count)
            if found is None:
                found = measure()
                _write(path, found)
        return found


def _own(folder: Path) -> Path | None:
    """Return the folder once nobody but this user may write there; None where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for place in (folder, folder.parent):
            about = place.lstat()
            if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
                log.error("others may write here, so no losses are shared", security=True, folder=str(place))
                return None
    except OSError as error:
        log.warning("losses cannot be shared", folder=str(folder), error=str(error))
        return None
    return folder


def _read(path: Path, count: int) -> Losses | None:
    with suppress(FileNotFoundError):
        data = path.read_bytes()
        body = data[_DIGEST:]
        if len(body) == 16 * count and hashlib.sha256(body).digest() == data[:_DIGEST]:
            return Losses(np.frombuffer(body, "<f8", count).copy(), np.frombuffer(body, "<i8", count, 8 * count).copy())
    return None


def _write(path: Path, found: Losses) -> None:
    body = found.sums.astype("<f8").tobytes() + found.tokens.astype("<i8").tobytes()
    draft = path.with_suffix(f".{os.getpid()}")
    # Not synced: what a power cut takes of it is measured again.
    draft.write_bytes(hashlib.sha256(body).digest() + body)
    draft.replace(path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a file lock; the kernel drops it if this process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
