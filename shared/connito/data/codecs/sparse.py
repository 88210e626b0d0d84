"""The largest numbers of every 4,096, in two bits each: where they are as gaps, and a sign and one of two sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from connito.data.codecs.planes import Plane, Size, bad_code
from connito.data.codecs.scales import Floats, codable, code_scales, read_scales

CHUNK = 4096
_SIZES = np.array([-2, -1, 1, 2], np.float32)
# A gap byte of this value goes on without a number.
_ON = 255


@dataclass(frozen=True)
class Sparse:
    """`parameter` numbers of every chunk, and as large a share of the last one."""

    parameter: int
    name: str = "top-k"
    tag: int = 5

    def sizes(self, shape: Sequence[int]) -> list[Size]:
        """Return the sizes of a tensor's planes: scales, gaps, values."""
        count = math.prod(shape)
        kept, chunks = sum(self._kept(count)), -(-count // CHUNK)
        values = -(-kept // 4)
        return [Size(1 + chunks, 1 + chunks), Size(kept, kept + count // _ON), Size(values, values)]

    def _kept(self, count: int) -> list[int]:
        whole, rest = divmod(count, CHUNK)
        return [self.parameter] * whole + ([-(-rest * self.parameter // CHUNK)] if rest else [])

    def encode(self, values: Floats) -> list[Plane]:
        """Return the planes of a tensor."""
        flat = values.reshape(-1)
        places = [
            start * CHUNK
            + np.sort(np.argsort(-np.abs(flat[start * CHUNK : (start + 1) * CHUNK]), kind="stable")[:kept])
            for start, kept in enumerate(self._kept(flat.size))
        ]
        at = np.concatenate(places) if places else np.zeros(0, np.int64)
        chunk, chosen = at // CHUNK, flat[at]
        of_chunk = np.maximum(np.bincount(chunk, minlength=len(places)), 1)
        means = np.bincount(chunk, np.abs(chosen), len(places)) / of_chunk
        # Sizes 1 and 2, the mean between them.
        scales = code_scales(np.asarray(means * (2 / 3) if codable(flat) else means + np.inf, np.float32))
        large = np.abs(chosen) > means[chunk]
        code = np.where(chosen < 0, 1 - large, 2 + large)
        return [scales, _gaps(at), _pack(code)]

    def decode(self, planes: Sequence[Plane], shape: Sequence[int], about: str) -> Floats:
        """Return a tensor. Raises `Invalid` for places outside of it, or another number of them."""
        count = math.prod(shape)
        scales, kept = read_scales(planes[0], about), sum(self._kept(count))
        ends = planes[1] < _ON
        at = (np.cumsum(planes[1].astype(np.int64) + ends) - 1)[ends]
        if len(at) != kept or (kept and int(at[-1]) >= count) or (len(ends) and not ends[-1]):
            raise bad_code(f"{about} does not have {kept} places in {count} numbers", about)
        code = ((planes[2][:, None] >> np.arange(0, 8, 2)) & 3).reshape(-1)[:kept]
        found = np.zeros(count, np.float32)
        found[at] = _SIZES[code] * scales[at // CHUNK]
        return found.reshape(shape)


def _gaps(at: NDArray[np.int64]) -> Plane:
    gaps = np.diff(at, prepend=-1) - 1
    more = gaps // _ON
    out = np.full(int(more.sum()) + len(gaps), _ON, np.uint8)
    out[np.cumsum(more + 1) - 1] = gaps % _ON
    return out


def _pack(code: NDArray[np.int64]) -> Plane:
    padded = np.zeros(-(-len(code) // 4) * 4, np.int64)
    padded[: len(code)] = code
    return np.asarray((padded.reshape(-1, 4) << np.arange(0, 8, 2)).sum(axis=1), np.uint8)
