"""Batches of one model that are computed at once, each by some of the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

# More at once would take much memory on machines with many cores.
MOST = 4


@contextmanager
def side_by_side(
    device: torch.device, tokens: int, batch_tokens: int
) -> Iterator[tuple[int, Callable[..., Iterable[Any]]]]:
    """Yield how many batches of `tokens` in all are computed at once, and the map that does so, results in order.

    On processors the products of one batch leave half of two cores idle, so up to four get batches of their own, none
    smaller than half of `batch_tokens`: each reads all weights. Inference mode and autocast hold in the thread that they are
    entered in.
    """
    threads = torch.get_num_threads()
    side = min(threads, MOST, max(1, 2 * tokens // batch_tokens))
    if side == 1 or device.type != "cpu":
        yield 1, map
        return
    try:
        with ThreadPoolExecutor(side, initializer=torch.set_num_threads, initargs=(threads // side,)) as pool:
            yield side, pool.map
    finally:
        # Some libraries count threads for the whole process.
        torch.set_num_threads(threads)
