"""Scales as bytes: three bits of mantissa, five of exponent, under a power of two of the tensor.

A scale is m · 2^(e − 34 + top) with m from 8 to 15 and e from 0 to 31, so a float32 with four significant bits; the byte 0 is 0.
`top` is a signed byte of the tensor. No byte is infinite or not a number; whoever has such a number to code writes `NOT_FINITE`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from connito.data.codecs.planes import Plane
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

Floats = NDArray[np.float32]

LOWEST, HIGHEST = -90, 30
NOT_FINITE = 127
# Larger numbers are no pseudo-gradient of anything, and are coded as what is not finite.
_LARGEST = 2.0**28

_BYTE = np.arange(256)
_UNITS: NDArray[np.float64] = np.where(_BYTE == 0, 0.0, np.ldexp((_BYTE & 7) + 8.0, (_BYTE >> 3) - 34))


def codable(values: Floats) -> bool:
    """Return whether all values are finite, and of a size that scales have."""
    return bool((np.abs(values) < _LARGEST).all())


def top_of(largest: float) -> int:
    """Return the power of two under which numbers up to `largest` are coded; `NOT_FINITE` where there is none."""
    if not np.isfinite(largest):
        return NOT_FINITE
    exponent = int(np.frexp(largest)[1]) - 1
    return NOT_FINITE if exponent > HIGHEST else max(exponent, LOWEST)


def checked_top(byte: int, about: str) -> int:
    """Return the power of two that a byte stands for. Raises `Invalid` (NON_FINITE) for one that no scale has."""
    top = byte - 256 if byte > 127 else byte
    if not LOWEST <= top <= HIGHEST:
        raise Invalid(f"{about} has a scale that is not a finite number", reason=reasons.REASON_NON_FINITE, about=about)
    return top


def code_scales(scales: Floats) -> Plane:
    """Return the plane of non-negative scales: `top`, then a byte each, rounded to the nearest in their logarithm."""
    # What rounds up to the next power of two belongs to that one.
    top = top_of(float(scales.max(initial=0.0)) * 32 / 31 if np.isfinite(scales).all() else np.inf)
    if top == NOT_FINITE:
        return np.array([NOT_FINITE] + [0] * len(scales), np.uint8)
    mantissa, exponent = np.frexp(np.maximum(scales.astype(np.float64), 1e-300))
    # From 0.5 … 1 to 8 … 16 and the place of the exponent; 16 is 8 of the next.
    steps = np.rint(mantissa * 16).astype(np.int64)
    place = exponent.astype(np.int64) - 1 - top + 31
    code = place * 8 + (steps - 8)
    found = np.where((code < 1) | (scales <= 0), 0, np.minimum(code, 255)).astype(np.uint8)
    return np.concatenate([np.array([top & 0xFF], np.uint8), found])


def read_scales(plane: Plane, about: str) -> Floats:
    """Return the scales of a plane, each exact in float32. Raises `Invalid` (NON_FINITE)."""
    return np.ldexp(_UNITS, checked_top(int(plane[0]), about)).astype(np.float32).take(plane[1:])
