"""Losses and counted tokens that the validators of one owner on one machine measure once: a file for each.

Who may write into the folder may say what anything is worth, so it is the owner's alone or it is not used at all. A value is
found under the hash of all that it follows from, and carries a checksum: what a power cut left of it is measured again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from connito.data.packing import Rows
from connito.protocol.scoring.evaluation import Losses
from connito.runtime.logs import get_logger
from connito.wire.hashing import hash_fields

log = get_logger("measuring")

T = TypeVar("T")

TAG = b"connito.shared-losses"
# Files that one run has at most, and a tenth more; each value has two.
MOST = 1000
_DIGEST = hashlib.sha256().digest_size


class SharedLosses:
    """Losses of one run. `judge` names the model and how it computes, to the last bit.

    `of` waits for whoever measures the same state just then, and measures where nobody has.
    """

    def __init__(self, folder: Path | None, run: str, *judge: str) -> None:
        self._folder = None if folder is None else _own(folder / run)
        self._judge = judge
        self._written = 0

    def of(self, state: str, rows: Rows, measure: Callable[[], Losses]) -> Losses:
        """Return the losses of a state on rows [n, L + 1]. `state` is named by its digests; without a name it is not shared."""
        return self._once(state, rows, measure, _packed, partial(_losses, len(rows)))

    def counts(self, state: str, rows: Rows, count: Callable[[], dict[int, list[int]]]) -> dict[int, list[int]]:
        """Return by layer how many tokens of rows [n, L + 1] go to each selected expert; the state is named as in `of`."""
        return self._once(state and f"tokens of {state}", rows, count, _text, _counts)

    def _once(
        self,
        state: str,
        rows: Rows,
        measure: Callable[[], T],
        pack: Callable[[T], bytes],
        unpack: Callable[[bytes], T | None],
    ) -> T:
        if self._folder is None or not state:
            return measure()
        content = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
        path = self._folder / hash_fields(TAG, *self._judge, state, str(rows.dtype), len(rows), content).hex()

        def known() -> T | None:
            body = _read(path)
            return None if body is None else unpack(body)

        try:
            if (found := known()) is None:
                with _alone(path.with_suffix(".lock")):
                    if (found := known()) is None:
                        found = measure()
                        _write(path, pack(found))
                        self._forget_old()
            return found
        except OSError as error:
            log.warning("losses cannot be shared", folder=str(self._folder), error=str(error))
            self._folder = None
        return measure()

    def _forget_old(self) -> None:
        """Keep what was measured last: a long run asks for the states of its latest cycles only."""
        self._written += 1
        if self._folder is None or self._written % (MOST // 10):
            return
        with suppress(FileNotFoundError):  # Another validator forgets just now.
            kept = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
            for path in kept[MOST:]:
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of what is known, once nobody will ask again."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


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


def _packed(found: Losses) -> bytes:
    return found.sums.astype("<f8").tobytes() + found.tokens.astype("<i8").tobytes()


def _losses(count: int, body: bytes) -> Losses | None:
    if len(body) != 16 * count:
        return None
    return Losses(np.frombuffer(body, "<f8", count).copy(), np.frombuffer(body, "<i8", count, 8 * count).copy())


def _text(found: dict[int, list[int]]) -> bytes:
    return json.dumps(sorted(found.items())).encode()


def _counts(body: bytes) -> dict[int, list[int]]:
    return dict(json.loads(body))


def _read(path: Path) -> bytes | None:
    with suppress(FileNotFoundError):
        data = path.read_bytes()
        if hashlib.sha256(data[_DIGEST:]).digest() == data[:_DIGEST]:
            return data[_DIGEST:]
    return None


def _write(path: Path, body: bytes) -> None:
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
