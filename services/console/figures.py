"""Use and change of each expert, from artifacts that the log names; read once, in the background.

A page never waits for the store. What is not there yet is being read, and the page is sent again when it is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
from connito.data.tensors import Array, read_header, read_tensors, to_float32
from connito.errors import ConnitoError, Invalid
from connito.runtime.tasks import end_tasks
from connito.store import ArtifactStore
from connito.v1.artifacts_pb2 import ArtifactRef

Figures = dict[int, dict[int, float]]
"""Layer → expert → figure."""

READING = "It is being read from the store."
NO_STORE = "It is in the store, and this console has no credentials for it."
MAX_REPORT_BYTES, MAX_STATE_BYTES = 32 << 20, 4 << 30
KEPT = 64


class ExpertFigures:
    """Figures by the digests that they come from. An answer is figures, or the sentence that says why there are none."""

    def __init__(self, store: ArtifactStore | None, moved: Callable[[], None]) -> None:
        self._store, self._moved = store, moved
        self._known: dict[tuple[str, ...], Figures | str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Comparing two states reads both; several at once would only slow each other down.
        self._one_at_a_time = asyncio.Lock()

    def use(self, report: ArtifactRef) -> Figures | str:
        """Return share of the probe's tokens or gate weight that went to each expert of each layer, as the selector
        scored it.
        """
        return self._get((report.digest,), lambda store: _use(store, report))

    def change(self, experts: dict[int, list[int]], first: ArtifactRef, last: ArtifactRef) -> Figures | str:
        """Return ‖θ_last − θ_first‖ / ‖θ_first‖ over all tensors of each selected expert."""
        if first.digest == last.digest:
            return {layer: dict.fromkeys(of_layer, 0.0) for layer, of_layer in experts.items()}
        return self._get((first.digest, last.digest), lambda store: _change(store, experts, first, last))

    async def close(self) -> None:
        """Stop reading."""
        await end_tasks(list(self._tasks))

    def _get(
        self, key: tuple[str, ...], read: Callable[[ArtifactStore], Coroutine[Any, Any, Figures]]
    ) -> Figures | str:
        if self._store is None:
            return NO_STORE
        if key not in self._known:
            self._known[key] = READING
            while len(self._known) > KEPT:
                self._known.pop(next(iter(self._known)))
            task = asyncio.create_task(self._read(key, read(self._store)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return self._known[key]

    async def _read(self, key: tuple[str, ...], reading: Coroutine[Any, Any, Figures]) -> None:
        try:
            async with self._one_at_a_time:
                self._known[key] = await reading
        except ConnitoError as error:
            self._known[key] = f"It could not be read: {error}"
        except (ValueError, KeyError, TypeError) as error:
            self._known[key] = f"It is not what it should be: {error!r}"
        self._moved()


async def _use(store: ArtifactStore, report: ArtifactRef) -> Figures:
    if report.size > MAX_REPORT_BYTES:
        raise Invalid(f"the selector's report has {report.size} bytes")
    scores = json.loads(await store.get_bytes(report))["scores"]
    return {int(layer): {expert: float(score) for expert, score in enumerate(row)} for layer, row in scores.items()}


async def _change(
    store: ArtifactStore, experts: dict[int, list[int]], first: ArtifactRef, last: ArtifactRef
) -> Figures:
    for ref in (first, last):
        if ref.size > MAX_STATE_BYTES:
            raise Invalid(f"a state of {ref.size} bytes is more than a page compares")
    paths = [await store.fetch(ref) for ref in (first, last)]
    return await asyncio.to_thread(change, paths[0], paths[1], experts)


def change(first: Path, last: Path, experts: dict[int, list[int]]) -> Figures:
    """Return the relative change of each expert between two states; rows lie in ascending expert id. `Invalid` when
    they do not hold the rows of these experts.
    """
    headers = [read_header(path, max_header_bytes=1 << 26) for path in (first, last)]
    (before, _), (after, _) = (read_tensors(path, mmap=True) for path in (first, last))
    moved: dict[int, Array] = {}
    length: dict[int, Array] = {}
    for name, rows in before.items():
        layer = int(name.split(".")[1])
        ids = sorted(experts.get(layer, []))
        if name not in after or after[name].shape != rows.shape or len(rows) != len(ids):
            raise Invalid(f"the states hold other rows of {name} than the selection names")
        for place in range(len(ids)):
            # One expert at a time: what is mapped costs memory only while it is looked at.
            old = to_float32(rows[place], headers[0].entries[name].dtype)
            new = to_float32(after[name][place], headers[1].entries[name].dtype)
            moved.setdefault(layer, np.zeros(len(ids)))[place] += float(np.sum((new - old) ** 2, dtype=np.float64))
            length.setdefault(layer, np.zeros(len(ids)))[place] += float(np.sum(old**2, dtype=np.float64))
    return {
        layer: {
            expert: float(np.sqrt(moved[layer][place] / max(length[layer][place], 1e-30)))
            for place, expert in enumerate(sorted(experts[layer]))
        }
        for layer in moved
    }
