"""The machine under a process: clocks, randomness, and a disk that keeps what it was given."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


class Disk:
    """Writing so that a crash at any moment leaves the old content or the new one, never a part. Raises `OSError`."""

    def write(self, path: Path, data: bytes) -> None:
        """Replace the content of a file."""
        draft = path.with_name(path.name + ".tmp")
        draft.write_bytes(data)
        self.keep(draft, path)

    def keep(self, draft: Path, path: Path) -> None:
        """Give a finished file its name: synced, then renamed, so that it is whole or not there."""
        for step in (draft, path.parent):
            descriptor = os.open(step, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            if step == draft:
                draft.replace(path)


def now_ms() -> int:
    """Return Unix time in milliseconds."""
    return time.time_ns() // 1_000_000


@dataclass(frozen=True)
class Host:
    """`now_ms` is the wall clock, which anybody may set (Unix milliseconds); `monotonic` only goes on (seconds)."""

    now_ms: Callable[[], int] = now_ms
    monotonic: Callable[[], float] = time.monotonic
    entropy: Callable[[int], bytes] = os.urandom
    disk: Disk = field(default_factory=Disk)


HOST = Host()
