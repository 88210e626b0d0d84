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
# Blocks that are coded at a time: with what comes between they fit a core's cache.
_AT_ONCE = 1 << 10


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
        # A cache full at a time.
        parts = [blocks[start : start + _AT_ONCE] for start in range(0, len(blocks), _AT_ONCE)]
        kept = [_kept(np.abs(part)) if self.levels == 1 else None for part in parts]
        scales = code_scales(np.concatenate([*map(self._scales, parts, kept), np.zeros(0, np.float32)]))
        steps = read_scales(scales, self.name)[:, None]
        packed = np.empty((len(blocks), BLOCK // self.packed), np.uint8)
        for place, (part, sent) in enumerate(zip(parts, kept, strict=True)):
            own = slice(place * _AT_ONCE, (place + 1) * _AT_ONCE)
            packed[own] = self._digits(part, steps[own], sent)
        return [scales, packed.reshape(-1)]

    def _scales(self, blocks: Floats, kept: NDArray[np.bool_] | None) -> Floats:
        if kept is None:
            return np.asarray(np.abs(blocks).max(axis=1) / self.levels, np.float32)
        # As long as the block was: the nearest would be shorter, and what is left would come a cycle late.
        count = np.maximum(np.count_nonzero(kept, axis=1), 1)
        squares = np.square(blocks.astype(np.float64))
        while squares.shape[1] > 1:
            # Halves onto halves: an outer step has to be coded alike everywhere, and libraries sum in orders of their own.
            squares = squares[:, ::2] + squares[:, 1::2]
        return np.asarray(np.sqrt(squares[:, 0] / count), np.float32)

    def _digits(self, blocks: Floats, steps: Floats, kept: NDArray[np.bool_] | None) -> Plane:
        """Return digits from 0 on, `packed` to a byte, [n, BLOCK / packed]."""
        if kept is None:
            whole = np.rint(np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0))
        else:
            whole = np.sign(blocks) * (kept & (steps > 0))
        whole += self.levels
        digits = (
            np.clip(whole, 0, 2 * self.levels, out=whole)
            .astype(np.uint8)
            .reshape(len(blocks), BLOCK // self.packed, self.packed)
        )
        packed = digits[..., 0].copy()
        for place in range(1, self.packed):
            packed += digits[..., place] * np.uint8((2 * self.levels + 1) ** place)
        return packed

    def decode(self, planes: Sequence[Plane], shape: Sequence[int], about: str) -> Floats:
        """Return a tensor. Raises `Invalid` for bytes that stand for no digits."""
        scales, packed = read_scales(planes[0], about), planes[1]
        base = 2 * self.levels + 1
        table = (np.arange(base**self.packed)[:, None] // base ** np.arange(self.packed)) % base - self.levels
        if packed.size and int(packed.max()) >= len(table):
            raise bad_code(f"{about} holds the byte {int(packed.max())}, which stands for no digits", about)
        digits = table.astype(np.float32).take(packed, axis=0).reshape(-1, BLOCK)
        digits *= scales[:, None]
        return digits.reshape(-1)[: math.prod(shape)].reshape(shape)


def _kept(size: Floats) -> NDArray[np.bool_]:
    """Return which numbers of ternary blocks [n, BLOCK] are sent."""
    edge = np.partition(size, BLOCK - KEPT, axis=1)[:, BLOCK - KEPT, None]
    return np.asarray((size >= edge) & (size > 0))
