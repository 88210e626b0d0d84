"""Memory of a process tree: the sum of proportional set sizes, in which a shared page counts once."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import suppress
from pathlib import Path


def tree_bytes(root: int) -> int:
    """Return the PSS of a process and all its descendants, in bytes; processes that end meanwhile are left out."""
    import psutil

    total = 0
    with suppress(psutil.Error):
        parent = psutil.Process(root)
        for process in (parent, *parent.children(recursive=True)):
            total += pss_bytes(process.pid)
    return total


def pss_bytes(pid: int) -> int:
    """Return the PSS of one process; its resident size where the kernel has no /proc/<pid>/smaps_rollup; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        import psutil

        with suppress(psutil.Error):
            return int(psutil.Process(pid).memory_info().rss)
    return 0


class PeakMemory:
    """Samples this process and its descendants until cancelled; `peak_bytes` is the largest sum seen.

    Looking walks the page tables of every process, so it rests forty times as long as it took.
    """

    def __init__(self, every_seconds: float = 2.0) -> None:
        self.every_seconds = every_seconds
        self.peak_bytes = 0

    def sample(self) -> int:
        """Take one sample; return its bytes."""
        total = tree_bytes(os.getpid())
        self.peak_bytes = max(self.peak_bytes, total)
        return total

    async def run(self) -> None:
        """Take samples until cancelled."""
        while True:
            began = time.monotonic()
            await asyncio.to_thread(self.sample)
            await asyncio.sleep(max(self.every_seconds, 40 * (time.monotonic() - began)))
