"""One pass over the files of a cycle: their numbers are checked, and their inner products summed, while they are there.

Files are read block by block and side by side, a base's block once for all that started from it. Blocks are added in their
order whatever the number of threads, and an array takes part in a product only with those of its block: so the sums are those
of `gram_matrix` and of `validate`, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connito.data.pseudo_gradients import DeltaFiles, add_products, gram_matrix, rounded_gram
from connito.data.tensors import Header, read_header, to_float32, view_tensor
from connito.errors import Environment, Invalid
from connito.protocol.findings import Refusal
from connito.protocol.submission import BLOCK, Layout, check_header, check_move, check_numbers, moved_by
from connito.runtime.compute import usable_cores

Flat = NDArray[np.float32]
# Files of states, and of those that each began from.
Moves = tuple[Sequence[Path], Sequence[Path]]


@dataclass(frozen=True)
class Inspected:
    """Findings of one pass: why files are refused, by their place, and inner products [n, n] of those that were judged before and
    of the others, in their order."""

    refused: Mapping[int, Refusal]
    gram: NDArray[np.float64]


def inspect(
    states: Sequence[Path], bases: Sequence[Path], layout: Layout, max_relative_norm: float, beside: Moves = ((), ())
) -> Inspected:
    """Check states of a layout that were trained from `bases`, as `validate` does, and measure how they moved, beside some that
    were judged before.

    Memory: one block of each file, and of the next. Raises an `Environment` for what is wrong with this machine, and `Invalid`
    where what was judged before has another form.
    """
    refused: dict[int, Refusal] = {}
    readers: dict[int, _File] = {}
    origins = {base: _File(base, read_header(base)) for base in {*bases, *beside[1]}}
    began = dict(enumerate(bases))
    for place, (state, base) in enumerate(zip(*beside, strict=True), -len(beside[0])):
        readers[place], began[place] = _File(state, check_header(state, layout, origins[base].header)), base
    for place, (state, base) in enumerate(zip(states, bases, strict=True)):
        try:
            readers[place] = _File(state, check_header(state, layout, origins[base].header))
        except Environment:
            raise
        except Invalid as error:
            refused[place] = Refusal.of(error)
    with ThreadPoolExecutor(usable_cores()) as pool:
        reading = _Reading(readers, {place: origins[began[place]] for place in readers}, pool)
        for name in sorted(layout) if readers else ():
            reading.add(name, layout[name][0], math.prod(layout[name][1]), max_relative_norm)
    refused |= reading.refused
    if reading.refused:
        left = [place for place in range(len(states)) if place not in refused]
        kept = [*beside[0], *(states[place] for place in left)], [*beside[1], *(bases[place] for place in left)]
        gram = gram_matrix(DeltaFiles(*kept))
    else:
        gram = rounded_gram(reading.total)
    return Inspected(refused, gram)


class _File:
    """A state's tensors as raw flat arrays, mapped."""

    def __init__(self, path: Path, header: Header) -> None:
        self.header = header
        self._bytes = np.memmap(path, dtype=np.uint8, mode="r")

    def block(self, name: str, part: slice) -> NDArray[np.generic]:
        return np.asarray(view_tensor(self._bytes, self.header, name).reshape(-1)[part])


@dataclass
class _Block:
    """A block of one file: how far it moved, its base's square, and its pseudo-gradient."""

    moved: float
    norm: float
    delta: Flat
    fault: Invalid | None = None


class _Reading:
    """Files at once, in the order of their places; those below 0 were judged before. `origins`: the base of each."""

    def __init__(self, files: Mapping[int, _File], origins: Mapping[int, _File], pool: ThreadPoolExecutor) -> None:
        self._files, self._origins, self._pool = files, origins, pool
        self.refused: dict[int, Refusal] = {}
        self.total = np.zeros((len(files), len(files)))

    def add(self, name: str, dtype: str, size: int, max_relative_norm: float) -> None:
        """Read a tensor of `size` numbers of all files."""
        moved, norm = dict.fromkeys(self._files, 0.0), dict.fromkeys(self._files, 0.0)
        for blocks in self._ahead(name, dtype, size):
            for place, block in blocks.items():
                moved[place] += block.moved
                norm[place] += block.norm
                if block.fault is not None and place >= 0:
                    self.refused.setdefault(place, Refusal.of(block.fault))
            add_products(self.total, [block.delta for block in blocks.values()])
        for place in (place for place in self._files if place >= 0):
            try:
                check_move(name, moved[place], norm[place], max_relative_norm)
            except Invalid as error:
                self.refused.setdefault(place, Refusal.of(error))

    def _ahead(self, name: str, dtype: str, size: int) -> Iterator[dict[int, _Block]]:
        """Yield the blocks of a tensor in their order; the next one is read meanwhile."""
        parts = [slice(start, start + BLOCK) for start in range(0, size, BLOCK)]
        begun: list[dict[int, Future[_Block]]] = []
        for part in parts[:1]:
            begun.append(self._begin(name, dtype, part))
        for _, following in [*pairwise(parts), (None, None)][: len(parts)]:
            blocks = {place: future.result() for place, future in begun.pop().items()}
            if following is not None:
                begun.append(self._begin(name, dtype, following))
            yield blocks

    def _begin(self, name: str, dtype: str, part: slice) -> dict[int, Future[_Block]]:
        read: dict[int, Future[tuple[Flat, NDArray[np.float64], float]]] = {}
        for origin in self._origins.values():
            if id(origin) not in read:
                read[id(origin)] = self._pool.submit(_base_block, origin.block(name, part), dtype)
        bases = {key: future.result() for key, future in read.items()}
        return {
            place: self._pool.submit(_block, name, file.block(name, part), dtype, bases[id(self._origins[place])])
            for place, file in self._files.items()
        }


def _base_block(raw: NDArray[np.generic], dtype: str) -> tuple[Flat, NDArray[np.float64], float]:
    before = to_float32(raw, dtype)
    exact = before.astype(np.float64)
    return before, exact, float(np.square(exact).sum())


def _block(name: str, raw: NDArray[np.generic], dtype: str, base: tuple[Flat, NDArray[np.float64], float]) -> _Block:
    before, exact, norm = base
    moved, after = moved_by(raw, dtype, exact)
    try:
        check_numbers(name, raw, dtype, moved)
    except Invalid as error:
        return _Block(0.0, norm, np.zeros_like(before), error)
    return _Block(moved, norm, before - after)
