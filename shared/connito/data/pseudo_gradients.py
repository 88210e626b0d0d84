"""δ_i = θ_base − θ_i: what a submission says the target experts should move by, read one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from connito.data.tensors import read_header, to_float32, view_tensor
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

# Elements per miner that are held as float64 at once while inner products are summed: few enough to stay in a core's cache.
CHUNK = 1 << 15


class Deltas(Protocol):
    """A source of the pseudo-gradients of `count` submissions, float32, tensor by tensor."""

    @property
    def names(self) -> Sequence[str]:
        """Return tensor names, sorted."""
        ...

    @property
    def count(self) -> int:
        """Return the number of submissions."""
        ...

    def load(self, index: int, name: str) -> NDArray[np.float32]:
        """Return δ of one tensor of one submission."""
        ...


@dataclass(frozen=True)
class DeltaFiles:
    """Pseudo-gradients from validated state files. states[i] was trained from bases[i]; all have one layout."""

    states: Sequence[Path]
    bases: Sequence[Path]

    def __post_init__(self) -> None:
        layouts = [
            {name: (entry.dtype, entry.shape) for name, entry in read_header(path).entries.items()}
            for path in (*self.states, *self.bases)
        ]
        if len(self.states) != len(self.bases) or any(layout != layouts[0] for layout in layouts):
            raise Invalid(
                "these states do not have the same tensors and cannot be compared", reason=reasons.REASON_WRONG_TENSORS
            )

    @property
    def names(self) -> list[str]:
        """Return tensor names, sorted."""
        return sorted(read_header(self.states[0]).entries) if self.states else []

    @property
    def count(self) -> int:
        """Return the number of submissions."""
        return len(self.states)

    @property
    def numbers(self) -> int:
        """Return how many numbers a pseudo-gradient has."""
        return (
            sum(math.prod(entry.shape) for entry in read_header(self.states[0]).entries.values()) if self.states else 0
        )

    def load(self, index: int, name: str) -> NDArray[np.float32]:
        """Return δ of one tensor of one submission."""
        return load_float32(self.bases[index], name) - load_float32(self.states[index], name)


@dataclass(frozen=True)
class DeltaSubset:
    """Some of the submissions of another source, in the order of `members`."""

    source: Deltas
    members: Sequence[int]

    @property
    def names(self) -> Sequence[str]:
        """Return tensor names, sorted."""
        return self.source.names

    @property
    def count(self) -> int:
        """Return the number of submissions."""
        return len(self.members)

    def load(self, index: int, name: str) -> NDArray[np.float32]:
        """Return δ of one tensor of one submission."""
        return self.source.load(self.members[index], name)


def load_float32(path: Path, name: str) -> NDArray[np.float32]:
    """Return one floating-point tensor of a state file as float32."""
    header = read_header(path)
    return to_float32(view_tensor(np.memmap(path, dtype=np.uint8, mode="r"), header, name), header.entries[name].dtype)


def gram_matrix(deltas: Deltas) -> NDArray[np.float64]:
    """Return inner products ⟨δ_i, δ_j⟩ over all tensors: float64 [n, n], symmetric.

    Relative to the product of norms, entries are rounded to 12 digits: a BLAS sums in an order of its own, and what is
    decided on these numbers should not depend on the machine.
    """
    total = np.zeros((deltas.count, deltas.count))
    for name in deltas.names if deltas.count else ():
        add_products(total, [deltas.load(index, name).reshape(-1) for index in range(deltas.count)])
    return rounded_gram(total)


def add_products(total: NDArray[np.float64], rows: Sequence[NDArray[np.float32]]) -> None:
    """Add the inner products of flat arrays of one length to a sum of such [n, n]."""
    size = len(rows[0])
    block = np.empty((len(rows), min(CHUNK, size)))
    for start in range(0, size, CHUNK):
        part = block[:, : size - start]
        for place, row in enumerate(rows):
            part[place] = row[start : start + CHUNK]
        total += part @ part.T


def rounded_gram(total: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sums of products [n, n] symmetric, and rounded as `gram_matrix` says."""
    norms = np.array([float(f"{value:.12e}") for value in np.sqrt(np.diag(total))])
    scale = np.outer(norms, norms)
    relative = np.divide(total, scale, out=np.zeros_like(total), where=scale > 0)
    relative = np.round((relative + relative.T) / 2, 12)
    return np.asarray(relative * scale)


def expert_grams(deltas: Deltas) -> dict[int, NDArray[np.float64]]:
    """Return inner products of each expert's rows alone, over all tensors of its layer: float64 [S, n, n] by layer.

    Rounded like `gram_matrix`.
    """
    totals: dict[int, NDArray[np.float64]] = {}
    for name in deltas.names if deltas.count else ():
        rows = [deltas.load(index, name) for index in range(deltas.count)]
        layer, experts = int(name.split(".")[1]), len(rows[0])
        total = totals.setdefault(layer, np.zeros((experts, deltas.count, deltas.count)))
        for expert in range(experts):
            add_products(total[expert], [row[expert].reshape(-1) for row in rows])
    return {layer: np.stack([rounded_gram(gram) for gram in total]) for layer, total in totals.items()}
