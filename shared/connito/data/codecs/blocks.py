"""Blocks of 64 numbers under one scale: ternary, four bits, eight bits.

A number is digit × scale, the digit from −L to L; digits are written in base 2 L + 1, several to a byte, so that a byte is a
symbol whose frequency the entropy coder sees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connito.data.codecs.planes import Plane, Size, bad_code
from connito.data.codecs.scales import Floats, codable, code_scales, read_scales

BLOCK = 64
# Of a ternary block the largest are sent, and all that are as large: one and a quarter bits a number. Twice as many would come
# nearest to it, for half as many bits again; what is left out comes back by error feedback.
KEPT = 18


@dataclass(frozen=True)
class Blocks:
    """Digits from −`levels` to `levels`, `packed` of them to a byte."""

    name: str
    tag: int
    levels: int
    packed: int
    parameter: int = BLOCK

    def sizes(self, shape: Sequence[int]) -> list[Size]:
        """Return the sizes of a tensor's planes: scales, digits."""
        blocks = -(-math.prod(shape) // BLOCK)
        scales, digits = 1 + blocks, blocks * BLOCK // self.packed
        return [Size(scales, scales), Size(digits, digits)]

    def encode(self, values: Floats) -> list[Plane]:
        """Return the planes of a tensor."""
        flat = values.reshape(-1)
        blocks = np.zeros((-(-flat.size // BLOCK), BLOCK), np.float32)
        blocks.reshape(-1)[: flat.size] = flat
        if not codable(flat):
            return [
                code_scales(np.full(len(blocks), np.inf, np.float32)),
                np.zeros(blocks.size // self.packed, np.uint8),
            ]
        scales = code_scales(self._scales(blocks))
        digits = self._digits(blocks, read_scales(scales, self.name)[:, None]).reshape(-1, self.packed)
        packed = digits[:, 0].copy()
        for place in range(1, self.packed):
            packed += digits[:, place] * np.uint8((2 * self.levels + 1) ** place)
        return [scales, packed]

    def _scales(self, blocks: Floats) -> Floats:
        if self.levels > 1:
            return np.asarray(np.abs(blocks).max(axis=1) / self.levels, np.float32)
        # As long as the block was: the nearest would be shorter, and what is left would come a cycle late.
        count = np.maximum(_kept(np.abs(blocks)).sum(axis=1), 1)
        squares = np.square(blocks.astype(np.float64))
        while squares.shape[1] > 1:
            # Halves onto halves: an outer step has to be coded alike everywhere, and libraries sum in orders of their own.
            squares = squares[:, ::2] + squares[:, 1::2]
        return np.asarray(np.sqrt(squares[:, 0] / count), np.float32)

    def _digits(self, blocks: Floats, steps: Floats) -> Plane:
        """Return digits from 0 on."""
        if self.levels == 1:
            digits = np.sign(blocks) * _kept(np.abs(blocks)) * (steps > 0)
        else:
            digits = np.rint(np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0))
        return np.asarray(np.clip(digits, -self.levels, self.levels) + self.levels, np.uint8)

    def decode(self, planes: Sequence[Plane], shape: Sequence[int], about: str) -> Floats:
        """Return a tensor. Raises `Invalid` for bytes that stand for no digits."""
        scales, packed = read_scales(planes[0], about), planes[1]
        base = 2 * self.levels + 1
        table = (np.arange(base**self.packed)[:, None] // base ** np.arange(self.packed)) % base - self.levels
        if packed.size and int(packed.max()) >= len(table):
            raise bad_code(f"{about} holds the byte {int(packed.max())}, which stands for no digits", about)
        digits = table.astype(np.float32)[packed].reshape(-1, BLOCK)
        digits *= scales[:, None]
        return digits.reshape(-1)[: math.prod(shape)].reshape(shape)


def _kept(size: Floats) -> NDArray[np.bool_]:
    """Return which numbers of ternary blocks [n, BLOCK] are sent."""
    edge = np.partition(size, BLOCK - KEPT, axis=1)[:, BLOCK - KEPT, None]
    return np.asarray((size >= edge) & (size > 0))
