"""Limits of this machine that a platform would run into, found before anything is started."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

from connito.errors import Retry
from connito.render import formats

# Broker, store and a dozen services with their connections, with room for a few runs.
OPEN_FILES = 1024
# Go programs reserve address space far beyond what they use.
ADDRESS_SPACE = 16 << 30
FREE_DISK = 256 << 20


def check_limits(folder: Path) -> None:
    """Allow this process as many open files as it may have. Raises `Retry` naming the limit that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        raise Retry(
            f"only {formats.count(hard, 'file')} may be open here, and {OPEN_FILES} are needed; allow more with `ulimit -n 4096`"
        )
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY and space < ADDRESS_SPACE:
        raise Retry(
            f"a process may have {formats.size(space)} of address space here, and the store and the broker need "
            f"{formats.size(ADDRESS_SPACE)}; allow more with `ulimit -v unlimited`"
        )
    free = shutil.disk_usage(folder).free
    if free < FREE_DISK:
        raise Retry(
            f"the disk of {folder} has {formats.size(free)} free, and at least {formats.size(FREE_DISK)} are needed; free "
            "some, or choose another --data-dir"
        )
