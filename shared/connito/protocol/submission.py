"""Judging a stranger's file before any model sees it.

Header first, then names, shapes and dtypes against the target experts of the run, then the numbers in small pieces.
Every violation is an `Invalid` with its own reason and the tensor's name; memory stays bounded whatever the file says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connito.data.tensors import (
    DTYPES,
    MAX_HEADER_BYTES,
    Array,
    Header,
    TensorEntry,
    read_header,
    to_float32,
    view_tensor,
)
from connito.errors import Invalid, Unusable
from connito.protocol.claims import claim_of
from connito.v1 import reasons_pb2 as reasons
from connito.v1.run_pb2 import RunSpec, SelectionMade

__all__ = ["Layout", "expected_layout", "max_submission_bytes", "read_header", "validate", "validate_move"]

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype, shape)."""

# Numbers that are looked at together: few enough to stay in a core's cache from one look to the next.
BLOCK = 1 << 16
# Per dtype: unsigned type of the same width, and the exponent bits that are all ones in infinities and NaNs.
_EXPONENT: dict[str, tuple[np.dtype[np.unsignedinteger[Any]], int]] = {
    "F32": (np.dtype("<u4"), 0x7F80_0000),
    "F16": (np.dtype("<u2"), 0x7C00),
    "BF16": (np.dtype("<u2"), 0x7F80),
}


def expected_layout(initial_state: Path | str | bytes | Header) -> Layout:
    """Return names, dtypes and shapes that every submission of a run must have: those of θ_0."""
    header = initial_state if isinstance(initial_state, Header) else read_header(initial_state)
    return {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}


def max_submission_bytes(layout: Layout) -> int:
    """Return the size cap of a submission: the tensors' bytes plus the largest header that is parsed."""
    data = sum(math.prod(shape) * DTYPES[dtype].itemsize for dtype, shape in layout.values())
    return 8 + MAX_HEADER_BYTES + data


def validate(
    source: Path | str | bytes,
    layout: Layout | Header,
    base: Path | str | bytes | None = None,
    max_relative_norm: float = 0.0,
    *,
    max_bytes: int = 0,
) -> Header:
    """Check a submission against the layout (or the header) of θ_0; returns its own header.

    Raises `Invalid` with REASON_OVERSIZED, BAD_HEADER, WRONG_TENSORS, WRONG_DTYPE, WRONG_SHAPE, NON_FINITE, or, where
    `base` is given, NORM_EXCEEDED if ‖θ_i − θ_base‖ > `max_relative_norm` · ‖θ_base‖ for one tensor (L2 norms; a base
    tensor of zeros counts as norm 1). `max_bytes` 0 means `max_submission_bytes(layout)`.
    """
    layout = expected_layout(layout) if isinstance(layout, Header) else layout
    origin = None if base is None else _Reader(base, read_header(base))
    header = check_header(source, layout, None if origin is None else origin.header, max_bytes=max_bytes)
    reader = _Reader(source, header)
    for name in sorted(layout):
        _check_values(name, reader, origin, max_relative_norm)
    return header


def check_header(
    source: Path | str | bytes, layout: Layout, base: Header | None = None, *, max_bytes: int = 0
) -> Header:
    """Return a submission's header once size, names, shapes and types are right. Raises as `validate`."""
    size = len(source) if isinstance(source, bytes) else _size(Path(source))
    limit = max_bytes or max_submission_bytes(layout)
    if size > limit:
        raise Invalid(f"the file has {size} bytes, at most {limit} are possible", reason=reasons.REASON_OVERSIZED)
    header = read_header(source)
    _check_layout(header, layout)
    if base is not None:
        _check_base(base, layout)
    for name in sorted(layout):
        if layout[name][0] not in _EXPONENT:
            what = f"{name} is {layout[name][0]}; expert weights are F32, F16 or BF16"
            raise Invalid(what, reason=reasons.REASON_WRONG_DTYPE, about=name)
    return header


def validate_move(
    source: Path | str | bytes,
    layout: Layout | Header,
    start: Path | str | None,
    spec: RunSpec,
    selection: SelectionMade,
) -> Header:
    """Check a submission as everybody does who judges one: its norm by `start`, the state θ_t that its own cycle started
    from, or not at all where that is lost. Over a run the state may move as far as it likes. What it claims has to be a claim.
    """
    header = validate(source, layout, start, spec.scoring.max_relative_norm or math.inf)
    claim_of(header, spec, selection)
    return header


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        text = f"cannot read {path}: {error.strerror}"
        raise Unusable(text, dependency="disk", reason=reasons.REASON_ARTIFACT_MISSING) from error


def _check_layout(header: Header, layout: Layout) -> None:
    missing, extra = sorted(layout.keys() - header.entries.keys()), sorted(header.entries.keys() - layout.keys())
    if missing or extra:
        odd = (missing or extra)[0]
        what = f"{odd} is missing" if missing else f"{odd} does not belong in it"
        raise Invalid(
            f"{what}; a submission holds exactly the {len(layout)} target tensors of the run",
            reason=reasons.REASON_WRONG_TENSORS,
            about=odd,
        )
    for name, (dtype, shape) in sorted(layout.items()):
        entry = header.entries[name]
        if entry.shape != shape:
            raise Invalid(
                f"{name} has shape {list(entry.shape)}, the selection needs {list(shape)}",
                reason=reasons.REASON_WRONG_SHAPE,
                about=name,
            )
        if entry.dtype != dtype:
            what = f"{name} is {entry.dtype}, the run uses {dtype}"
            raise Invalid(what, reason=reasons.REASON_WRONG_DTYPE, about=name)


def _check_base(header: Header, layout: Layout) -> None:
    found = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
    assert found == layout, "the base state of a run has the layout of the run"


def _check_values(name: str, reader: _Reader, origin: _Reader | None, max_relative_norm: float) -> None:
    moved = norm = 0.0
    dtype = reader.header.entries[name].dtype
    bases = iter(()) if origin is None else origin.blocks(name)
    for block in reader.blocks(name):
        if origin is None:
            check_numbers(name, block, dtype)
            continue
        before = to_float32(next(bases), dtype).astype(np.float64)
        step, _ = moved_by(block, dtype, before)
        check_numbers(name, block, dtype, step)
        moved += step
        norm += float(np.square(before, out=before).sum())
    if origin is not None:
        check_move(name, moved, norm, max_relative_norm)


def moved_by(block: Array, dtype: str, before: NDArray[np.float64]) -> tuple[float, NDArray[np.float32]]:
    """Return the square of the distance from `before`, and the block as float32. What is not finite makes the square so."""
    after = to_float32(block, dtype)
    with np.errstate(invalid="ignore"):
        step = np.subtract(after, before, dtype=np.float64)
        return float(np.square(step, out=step).sum()), after


def check_move(name: str, moved: float, norm: float, max_relative_norm: float) -> None:
    """Raise `Invalid` (NORM_EXCEEDED) where a tensor moved too far: by squares of its distance and of its base's norm."""
    relative = math.sqrt(moved) / (math.sqrt(norm) or 1.0)
    if relative > max_relative_norm:
        raise Invalid(
            f"{name} moved by {relative:.4g} of its norm in one cycle; the run allows {max_relative_norm:.4g}",
            reason=reasons.REASON_NORM_EXCEEDED,
            about=name,
        )


def check_numbers(name: str, block: Array, dtype: str, moved: float = math.nan) -> None:
    """Raise `Invalid` (NON_FINITE) for infinities and NaNs, by bit pattern. A finite square of the distance from a finite state
    shows already that there are none: squares of float32 numbers do not overflow float64.
    """
    if math.isfinite(moved):
        return
    unsigned, exponent = _EXPONENT[dtype]
    bits = block.view(unsigned)
    if bool(np.any((bits & exponent) == exponent)):
        raise Invalid(f"{name} holds infinities or NaNs", reason=reasons.REASON_NON_FINITE, about=name)


class _Reader:
    """One file, read in blocks of raw values."""

    def __init__(self, source: Path | str | bytes, header: Header) -> None:
        self.source = source if isinstance(source, bytes) else Path(source)
        self.header = header

    def blocks(self, name: str) -> Iterator[Array]:
        entry: TensorEntry = self.header.entries[name]
        if isinstance(self.source, bytes):
            flat = view_tensor(self.source, self.header, name).reshape(-1)
            for start in range(0, len(flat), BLOCK):
                yield flat[start : start + BLOCK]
            return
        with self.source.open("rb") as file:
            file.seek(self.header.data_start + entry.start)
            for start in range(0, math.prod(entry.shape), BLOCK):
                count = min(BLOCK, math.prod(entry.shape) - start)
                yield np.fromfile(file, DTYPES[entry.dtype], count)
