"""Room in the local cache: what was used longest ago goes first, and hand-ins, which one cycle needs, before all else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from connito.runtime import metrics

# Whoever was given a path opens it sooner than this.
IN_USE_SECONDS = 600.0
# So much of the disk stays free where no limit was set: a share, and at most these bytes.
FREE_SHARE, FREE_BYTES = 0.05, 4 << 30
# Endings of what lies beside a file: of one that goes first, and of the mark whose time is when it was last asked for.
PASSING, USED = ".passing", ".ok"


@dataclass(frozen=True)
class _Entry:
    path: Path
    size: int
    used: float
    passing: bool


def make_room(
    folder: Path,
    need: int,
    limit: int,
    *,
    now: Callable[[], float] = time.time,
    free: Callable[[Path], int] | None = None,
) -> int:
    """Evict so that `need` bytes more fit below `limit`, or without one (0), leave some of the disk free; return the bytes freed.

    Only what nobody has asked for in a while goes: where that is not enough, the cache grows past its limit.
    """
    # Without a limit the disk says what is taken, and nobody has to look at every file for it.
    entries = list(_entries(folder)) if limit else []
    excess = sum(entry.size for entry in entries) + need - limit if limit else _excess(folder, need, free or _free)
    if excess <= 0:
        return 0
    freed, before = 0, now() - IN_USE_SECONDS
    for entry in sorted(entries or _entries(folder), key=lambda entry: (not entry.passing, entry.used)):
        if freed >= excess:
            break
        if entry.used < before:
            _evict(entry.path)
            freed += entry.size
    return freed


def drop(folder: Path, digests: Iterable[str], *, now: Callable[[], float] = time.time) -> set[str]:
    """Evict what the store has collected; return those that somebody asked for just now, and may open: they go another time."""
    left, before = set(), now() - IN_USE_SECONDS
    for digest in digests:
        path = folder / "sha256" / digest[:2] / digest
        with suppress(OSError):
            if path.with_name(path.name + USED).stat().st_mtime >= before:
                left.add(digest)
                continue
        if path.exists():
            _evict(path)
    return left


def _evict(file: Path) -> None:
    marks = (file.with_name(file.name + end) for end in (USED, PASSING))
    for path in (file, *file.parent.glob(f"{file.name}.*.open"), *marks):
        path.unlink(missing_ok=True)
    metrics.CACHE.labels("evicted").inc()


def _excess(folder: Path, need: int, free: Callable[[Path], int]) -> int:
    spare = min(FREE_BYTES, int(FREE_SHARE * shutil.disk_usage(folder).total))
    return need + spare - free(folder)


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _entries(folder: Path) -> Iterator[_Entry]:
    """Yield the files of the cache; `used` is when one was last asked for, which its mark keeps."""
    for mark in folder.glob(f"sha256/*/*{USED}"):
        with suppress(OSError):
            path = mark.with_suffix("")
            yield _Entry(path, path.stat().st_size, mark.stat().st_mtime, path.with_name(path.name + PASSING).exists())
