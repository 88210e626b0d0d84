"""Reading and writing safetensors with numpy alone, strictly on the way in and byte for byte the same on the way out.

A file is an 8-byte little-endian header length, a JSON header and the tensors' bytes. Readers elsewhere tolerate a lot;
this one takes files from strangers, so whatever is not exactly the format is refused before a tensor is touched.
numpy has no bfloat16: such tensors are handled as their raw `uint16` bits, see `to_float32` and `from_float32`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from connito.data.safetensors_header import bad_header, header_bytes, read_header_text
from connito.errors import Invalid, NotFound

Array = NDArray[Any]

# Format name -> how numpy holds it. BF16 is raw bits.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "I64": np.dtype("<i8"),
    "U64": np.dtype("<u8"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U16": np.dtype("<u2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
# Bits of a value in every type of the format, those included that only checkpoints have.
STORED_BITS = {
    **{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()},
    "C64": 64,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F4": 4,
}
_OWN_BITS = {name: STORED_BITS[name] for name in DTYPES}
_NAME_OF = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}

MAX_HEADER_BYTES = 1 << 20
# Of headers that are no longer, some are remembered with what they say.
SHORT = 1 << 14
_MAX_DIMENSIONS = 8
_NAME = re.compile(r"[!-~]{1,256}")
_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class TensorEntry:
    """One line of the header. `start` and `stop` count bytes from the beginning of the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A checked header: entries in the order of their bytes, metadata, and where the data lies in the file."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]
    data_start: int
    data_bytes: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise bad_header("a key occurs twice in the header")
    return found


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise bad_header(
            f"the header holds the number {text[:24]}, which is negative, too large or not written plainly"
        )
    return int(text)


def _no_number(text: str) -> Any:
    raise bad_header(f"the header holds {text[:24]} where only whole numbers may stand")


def _parse_json(raw: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise bad_header(f"the header is not JSON ({type(error).__name__})") from error
    if not isinstance(parsed, dict):
        raise bad_header("the header is not a JSON object")
    return parsed


def _parse_entry(name: str, raw: Any, widths: Mapping[str, int]) -> TensorEntry:
    if not _NAME.fullmatch(name):
        raise bad_header(f"the tensor name {name[:64]!a} is not 1 to 256 printable ASCII characters")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise bad_header(f"{name} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in widths:
        raise bad_header(f"{name} has an unknown dtype")
    # `type(...) is int`: True is an int to isinstance, and JSON has booleans.
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or any(type(size) is not int for size in shape):
        raise bad_header(f"the shape of {name} is not a list of at most {_MAX_DIMENSIONS} whole numbers")
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise bad_header(f"the data_offsets of {name} are not two whole numbers")
    expected = math.prod(shape) * widths[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        raise bad_header(f"{name} is {offsets[1] - offsets[0]} bytes long, its dtype and shape need {expected}")
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _parse_header(raw: bytes, data_bytes: int, widths: Mapping[str, int]) -> Header:
    if raw[:1] != b"{":
        raise bad_header("the header does not begin with a brace")
    parsed = _parse_json(raw.rstrip(b" "))
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad_header("__metadata__ must map text to text")
    entries = {name: _parse_entry(name, entry, widths) for name, entry in parsed.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = 0
    for name, entry in ordered.items():
        if entry.start != position:
            kind = "overlaps what comes before it" if entry.start < position else "leaves a gap before it"
            raise bad_header(f"{name} {kind}")
        position = entry.stop
    if position != data_bytes:
        raise bad_header(f"the tensors end at byte {position}, the file holds {data_bytes} bytes of data")
    return Header(ordered, metadata, 8 + len(raw), data_bytes)


@functools.lru_cache(maxsize=256)
def _remembered(raw: bytes, data_bytes: int) -> Header:
    return _parse_header(raw, data_bytes, _OWN_BITS)


def read_header(
    source: Path | str | bytes, *, max_header_bytes: int = MAX_HEADER_BYTES, widths: Mapping[str, int] = _OWN_BITS
) -> Header:
    """Parse and check the header of a safetensors file; no tensor data is read.

    `widths`: bits of a value by each type that may occur.

    Refused with `Invalid` (REASON_BAD_HEADER): a length beyond the cap or the file, anything but plain JSON, duplicate
    keys, fields that do not belong, unknown dtypes, numbers that are not plain and non-negative, sizes that do not
    follow from dtype and shape, gaps, overlaps and trailing bytes. `NotFound` if there is no such file.
    """
    try:
        with BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
            text = read_header_text(file, max_header_bytes)
            data_bytes = file.seek(0, 2) - 8 - len(text)
            if len(text) > SHORT or widths is not _OWN_BITS:
                return _parse_header(text, data_bytes, widths)
            # The states of a run have one header, which is read again for each of their tensors.
            known = _remembered(text, data_bytes)
            return replace(known, metadata=dict(known.metadata))
    except OSError as error:
        raise NotFound(f"cannot read {source!r}: {error.strerror}") from error


def read_tensors(
    source: Path | str | bytes,
    names: Iterable[str] | None = None,
    *,
    mmap: bool = False,
    max_header_bytes: int = 1 << 26,
) -> tuple[dict[str, Array], dict[str, str]]:
    """Return tensors by name, and the metadata. BF16 comes as raw `uint16`; `read_header` tells which those are.

    With `mmap` (paths only) arrays are read-only views of the file and cost memory only while they are touched.
    `NotFound` if a name in `names` is missing, `Invalid` for a file that is not well-formed.
    """
    header = read_header(source, max_header_bytes=max_header_bytes)
    wanted = list(header.entries) if names is None else list(names)
    missing = [name for name in wanted if name not in header.entries]
    if missing:
        raise NotFound(f"no tensor is called {missing[0]}; the file has {', '.join(sorted(header.entries)[:8])}")
    if isinstance(source, bytes):
        return {name: view_tensor(source, header, name) for name in wanted}, header.metadata
    if mmap and header.data_bytes:
        mapped = np.memmap(source, dtype=np.uint8, mode="r")
        return {name: view_tensor(mapped, header, name) for name in wanted}, header.metadata
    with Path(source).open("rb") as file:
        return {name: _read(file, header, name) for name in wanted}, header.metadata


def view_tensor(buffer: bytes | Array, header: Header, name: str) -> Array:
    """Return one tensor of a whole file in memory (or mapped), without a copy."""
    entry = header.entries[name]
    count, offset = math.prod(entry.shape), header.data_start + entry.start
    if count == 0:
        return np.zeros(entry.shape, DTYPES[entry.dtype])
    return np.frombuffer(buffer, DTYPES[entry.dtype], count, offset).reshape(entry.shape)


def _read(file: BinaryIO, header: Header, name: str) -> Array:
    entry = header.entries[name]
    file.seek(header.data_start + entry.start)
    data = np.fromfile(file, DTYPES[entry.dtype], math.prod(entry.shape))
    return data.reshape(entry.shape)


Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (dtype as the format names it, shape)."""


class TensorWriter:
    """Write a file tensor by tensor, so that only one has to be in memory.

    Bytes depend on layout, metadata and values only: widest dtypes first and then by name, data aligned to 64 bytes.
    Tensors must be written in the order of `names`. The file appears under its name when the context is left without an
    error; before that it is called `<name>.partial`. `digested`: hash what is written.
    """

    def __init__(
        self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None, *, digested: bool = True
    ) -> None:
        self.path = path
        self.layout = dict(layout)
        self.names = _order(layout)
        self._written = 0
        self._partial = path.with_name(path.name + ".partial")
        self._file = self._partial.open("wb")
        self._hash, self.size = hashlib.sha256() if digested else None, 0
        self._append(_header_bytes(layout, metadata or {}))

    @property
    def digest(self) -> str:
        """Return the SHA-256 of what was written so far, in hex."""
        assert self._hash is not None, "this file is not hashed"
        return self._hash.hexdigest()

    def _append(self, data: Any) -> None:
        if self._hash is not None:
            self._hash.update(data)
        self.size += self._file.write(data)

    def write(self, name: str, array: Array) -> None:
        """Append one tensor. An array of another shape, dtype or position is a programming error."""
        assert name == self.names[self._written], f"{name} is written out of order"
        self._append(_raw(name, array, *self.layout[name]).data)
        self._written += 1

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._partial.unlink()
            return
        assert self._written == len(self.names), "not every tensor was written"
        self._partial.replace(self.path)


def tensor_bytes(
    tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None, *, dtypes: Mapping[str, str] | None = None
) -> bytes:
    """Build a safetensors file in memory. `dtypes` overrides names, for example `{"w": "BF16"}` for raw `uint16`
    bits.
    """
    layout = layout_of(tensors, dtypes or {})
    parts = [_header_bytes(layout, metadata or {})]
    parts += [_raw(name, tensors[name], *layout[name]).tobytes() for name in _order(layout)]
    return b"".join(parts)


def layout_of(
    tensors: Mapping[str, Array], dtypes: Mapping[str, str] | None = None
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the layout of arrays, with the dtypes that stand for others by name. Raises `Invalid` for one that safetensors
    cannot hold."""
    layout = {}
    for name, array in tensors.items():
        dtype = (dtypes or {}).get(name) or _NAME_OF.get(array.dtype.newbyteorder("<"))
        if dtype is None:
            raise Invalid(f"{name} has dtype {array.dtype}, which safetensors cannot hold")
        layout[name] = (dtype, tuple(array.shape))
    return layout


def _order(layout: Layout) -> list[str]:
    return sorted(layout, key=lambda name: (-DTYPES[layout[name][0]].itemsize, name))


def _header_bytes(layout: Layout, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for name in _order(layout):
        dtype, shape = layout[name]
        stop = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    return header_bytes(header)


def _raw(name: str, array: Array, dtype: str, shape: tuple[int, ...]) -> Array:
    assert tuple(array.shape) == shape, f"{name} has shape {array.shape}, not {shape}"
    assert array.dtype.itemsize == DTYPES[dtype].itemsize, f"{name} has dtype {array.dtype}, not {dtype}"
    return np.ascontiguousarray(array, DTYPES[dtype] if dtype != "BF16" else np.dtype("<u2"))


def to_float32(array: Array, dtype: str) -> NDArray[np.float32]:
    """Return values of an F32, F16 or BF16 tensor as read from a file; F32 as it is. Exact: every such number is a float32."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    assert dtype in {"F32", "F16"}, f"{dtype} holds no floating-point weights"
    return array.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], dtype: str) -> Array:
    """Round finite float32 values to nearest-even into the bits that a tensor of `dtype` stores."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert dtype in {"F32", "F16"}, f"{dtype} holds no floating-point weights"
    return values.astype(DTYPES[dtype])
