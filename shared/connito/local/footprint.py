"""Room that nothing needs any more: old lines of logs; of an ended run, copies of what the store has and handed-in work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from connito.platform.datadir import DataDir
from connito.store.eviction import PASSING, USED

# Smaller copies stay: they cost nothing, and reading them is quicker than starting the store.
LARGE_BYTES = 8 << 20

# A log that has grown so long keeps its last quarter.
LOG_BYTES, CHUNK = 32 << 20, 1 << 20


def trim(logs: Path) -> None:
    """Cut the logs that have grown long. Who writes one appends, and goes on at its new end."""
    for path in (*logs.glob("*.log"), *logs.glob("*.jsonl")):
        with suppress(OSError):
            if (size := path.stat().st_size) > LOG_BYTES:
                with path.open("r+b", buffering=0) as file:
                    _keep_from(file.fileno(), size - LOG_BYTES // 4)


def _keep_from(file: int, at: int) -> None:
    """Move the lines that begin behind `at` to the front, with those that somebody appends meanwhile, and cut off the rest."""
    kept, first = 0, True
    while part := os.pread(file, CHUNK, at):
        at += len(part)
        kept += os.pwrite(file, part.partition(b"\n")[2] if first else part, kept)
        first = False
    os.ftruncate(file, kept)


@dataclass(frozen=True)
class Room:
    """Files that nothing needs any more, and their bytes on the disk."""

    files: list[Path]
    bytes: int


def superfluous(data: DataDir) -> Room:
    """Return what may go from a folder in which nothing runs."""
    files = [*_copies(data.cache), *_copies(data.root / "cache-miners"), *_work(data.root / "miners")]
    return Room(files, sum(path.stat().st_size for path in files))


def tidy(data: DataDir) -> Room:
    """Delete `superfluous` files, and return which they were. Call with the folder's lock held."""
    room = superfluous(data)
    for path in room.files:
        for one in (
            path,
            *(path.with_name(path.name + end) for end in (USED, PASSING)),
            *path.parent.glob(f"{path.name}.*.open"),
        ):
            one.unlink(missing_ok=True)
    return room


def _copies(cache: Path) -> Iterator[Path]:
    """Yield large files of a cache that are copies: one with a second name is the base's own file, and takes no room."""
    for mark in cache.glob(f"sha256/*/*{USED}"):
        path = mark.with_suffix("")
        if path.is_file() and path.stat().st_nlink == 1 and path.stat().st_size >= LARGE_BYTES:
            yield path


def _work(miners: Path) -> Iterator[Path]:
    """Yield the tensors that miners keep between cycles."""
    yield from (path for path in miners.glob("*/*/*/*.safetensors") if path.stat().st_size >= LARGE_BYTES)
