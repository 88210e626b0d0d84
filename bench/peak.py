"""Time and peak memory of a piece of work."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


def peak_of(work: Callable[[], object]) -> tuple[float, int]:
    """Return seconds, and the most bytes that `work` made this process hold by itself beyond what it held before.

    Anonymous pages: a mapped file is not counted. Looked at every 10 ms.
    """
    before, peak, done = _anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - started
        done.set()
        watcher.join()
    return seconds, max(0, peak[0] - before)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0
