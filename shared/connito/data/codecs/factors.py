"""Two factors of int8 for each matrix: δ ≈ U diag(2^e) Vᵀ.

Decoding is exact, whatever library multiplies the matrices: U, its powers of two multiplied in, and V are whole numbers, and so
is every partial sum, below 2^53 (7 + 7 bits of a product, 30 of a power, 8 of at most 256 terms). The only rounding is the last
one, to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connito.data.codecs.planes import Plane, Size, bad_code
from connito.data.codecs.scales import HIGHEST, LOWEST, NOT_FINITE, Floats, checked_top, codable

MAX_RANK = 256
_SHIFTS = 30
_ITERATIONS = 4
_OVERSAMPLING = 8

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Factors:
    """At most `parameter` columns a factor."""

    parameter: int
    name: str = "low-rank"
    tag: int = 4

    def sizes(self, shape: Sequence[int]) -> list[Size]:
        """Return the sizes of a tensor's planes: powers of two (that of the matrix, then of its columns), U, V."""
        count, rows, columns, rank = self._layout(shape)
        lengths = count * (1 + rank), count * rows * rank, count * columns * rank
        return [Size(length, length) for length in lengths]

    def _layout(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """Return matrices, rows, columns and rank of a tensor; one of fewer than two dimensions is a matrix of one row."""
        *outer, rows, columns = (1, 1, *shape)
        return math.prod(outer), rows, columns, min(self.parameter, rows, columns)

    def encode(self, values: Floats) -> list[Plane]:
        """Return the planes of a tensor."""
        count, rows, columns, rank = self._layout(values.shape)
        powers = np.zeros((count, 1 + rank), np.uint8)
        left, right = np.zeros((count, rows, rank), np.int8), np.zeros((count, columns, rank), np.int8)
        for index, matrix in enumerate(values.reshape(count, rows, columns)):
            if not codable(matrix):
                powers[index, 0] = NOT_FINITE
            elif rank and matrix.any():
                powers[index], left[index], right[index] = _factor(matrix.astype(np.float64), rank)
        return [plane.reshape(-1).view(np.uint8) for plane in (powers, left, right)]

    def decode(self, planes: Sequence[Plane], shape: Sequence[int], about: str) -> Floats:
        """Return a tensor. Raises `Invalid` for powers of two that no column has."""
        count, rows, columns, rank = self._layout(shape)
        powers = planes[0].reshape(count, 1 + rank)
        left = planes[1].view(np.int8).reshape(count, rows, rank)
        right = planes[2].view(np.int8).reshape(count, columns, rank)
        found = np.empty((count, rows, columns), np.float32)
        if rank and powers[:, 1:].max(initial=0) > _SHIFTS:
            raise bad_code(f"{about} has a column whose power of two does not exist", about)
        for index in range(count):
            top = checked_top(int(powers[index, 0]), about)
            whole = np.ldexp(left[index].astype(np.float64), _SHIFTS - powers[index, 1:].astype(np.int64))
            found[index] = np.ldexp(whole @ right[index].astype(np.float64).T, top - _SHIFTS - 14)
        return found.reshape(shape)


def _factor(matrix: Matrix, rank: int) -> tuple[Plane, NDArray[np.int8], NDArray[np.int8]]:
    """Return the powers of two, U and V of one matrix, of the leading `rank` of its singular vectors.

    Subspace iteration from a fixed start (Halko, Martinsson and Tropp, 2011); V is then the best one for U as it was rounded.
    """
    start = np.random.default_rng(0).standard_normal((matrix.shape[1], min(rank + _OVERSAMPLING, *matrix.shape)))
    basis = np.linalg.qr(matrix @ start)[0]
    for _ in range(_ITERATIONS):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    inner, *_ = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    columns = (basis @ inner)[:, :rank]
    columns = np.rint(columns * (127 / np.maximum(np.abs(columns).max(axis=0), 1e-300)))
    across = np.linalg.lstsq(columns, matrix, rcond=None)[0].T
    largest = np.abs(across).max(axis=0)
    # A column of V is v · 2^(top − shift − 14): its largest number is 64 to 127.
    needed = np.frexp(np.maximum(largest, 1e-300) / 127)[1] + 14
    top = max(int(needed.max()), LOWEST)
    shifts = np.clip(top - needed, 0, _SHIFTS)
    right = np.rint(np.ldexp(across, shifts + 14 - top)).clip(-127, 127)
    powers = np.array([top & 0xFF if top <= HIGHEST else NOT_FINITE, *shifts], np.uint8)
    return powers, columns.astype(np.int8), right.astype(np.int8)
