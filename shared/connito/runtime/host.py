"""The machine under a process: clocks, randomness, and a disk that keeps what it was given."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from connito import files


class Disk:
    """Writing so that a crash at any moment leaves the old content or the new one, never a part. Raises `OSError`."""

    def write(self, path: Path, data: bytes) -> None:
        """Replace the content of a file."""
        files.write_durably(path, data)

    def keep(self, draft: Path, path: Path) -> None:
        """Give a finished file its name: synced, then renamed, so that it is whole or not there."""
        files.keep(draft, path)


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
