"""Planes: arrays of bytes, entropy-coded one by one, each of a size that its reader knows beforehand.

Raw deflate with Huffman codes alone: digits of a pseudo-gradient do not repeat, but they are not evenly frequent.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

Plane = NDArray[np.uint8]

_LENGTH_BYTES = 4


@dataclass(frozen=True)
class Size:
    """Bytes of a plane in clear: `least` to `most`."""

    least: int
    most: int

    @property
    def coded(self) -> int:
        """Return the most bytes that the plane has when it is coded: deflate stores what it cannot make shorter."""
        return self.most + self.most // 100 + 64


def packed(planes: Sequence[Plane]) -> bytes:
    """Return planes as they lie in a file, each behind its coded length."""
    parts = []
    for plane in planes:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
        coded = deflate.compress(np.ascontiguousarray(plane).data) + deflate.flush()
        parts += [len(coded).to_bytes(_LENGTH_BYTES, "little"), coded]
    return b"".join(parts)


def read_planes(file: BinaryIO, sizes: Sequence[Size], about: str) -> list[Plane]:
    """Read planes of the given sizes. Raises `Invalid` (BAD_HEADER) about the tensor `about` for anything else.

    Spends the coded and the clear bytes of the planes on memory, and no more whatever the file says.
    """
    return [_read(file, size, f"plane {number} of {about}", about) for number, size in enumerate(sizes)]


def _read(file: BinaryIO, size: Size, what: str, about: str) -> Plane:
    head = file.read(_LENGTH_BYTES)
    length = int.from_bytes(head, "little")
    if len(head) < _LENGTH_BYTES:
        raise bad_code(f"the file ends before {what}", about)
    if length > size.coded:
        raise bad_code(f"{what} has {length} coded bytes, at most {size.coded} are possible", about)
    coded = file.read(length)
    if len(coded) < length:
        raise bad_code(f"the file ends inside {what}", about)
    inflate = zlib.decompressobj(-15)
    try:
        clear = inflate.decompress(coded, size.most + 1)
    except zlib.error as error:
        raise bad_code(f"{what} is not a deflate stream ({error})", about) from error
    if not size.least <= len(clear) <= size.most:
        few = f"{size.least}" if size.least == size.most else f"{size.least} to {size.most}"
        raise bad_code(f"{what} has {len(clear)} or more bytes in clear where {few} belong", about)
    if not inflate.eof or inflate.unused_data or inflate.unconsumed_tail:
        raise bad_code(f"{what} does not end with its stream", about)
    return np.frombuffer(clear, np.uint8)


def bad_code(message: str, about: str = "") -> Invalid:
    """Return the error for bytes that no encoder writes."""
    return Invalid(
        f"{message}; code the submission again with this run's codec", reason=reasons.REASON_BAD_HEADER, about=about
    )
