"""The file of a coded pseudo-gradient: prefix, codec, parameter, a note of its author, and the planes of each tensor by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Protocol

from connito.data.codecs.blocks import Blocks
from connito.data.codecs.factors import MAX_RANK, Factors
from connito.data.codecs.planes import Plane, Size, bad_code, packed, read_planes
from connito.data.codecs.scales import Floats
from connito.data.codecs.sparse import CHUNK, Sparse
from connito.data.tensors import Layout
from connito.errors import Invalid, NotFound
from connito.v1 import reasons_pb2 as reasons

CODED = "application/vnd.connito.pseudo-gradient"

_PREFIX, _WITH_NOTE = b"connito\x01", b"connito\x02"
_HEAD_BYTES = len(_PREFIX) + 5
MAX_NOTE_BYTES = 1 << 19
_BLOCKS = {made.name: made for made in (Blocks("ternary", 1, 1, 4), Blocks("int4", 2, 7, 2), Blocks("int8", 3, 127, 1))}


class Codec(Protocol):
    """A way to write a tensor of float32 as planes, with what the policy says of it as a number."""

    @property
    def name(self) -> str:
        """Return its name in a policy."""
        ...

    @property
    def tag(self) -> int:
        """Return its number in files."""
        ...

    @property
    def parameter(self) -> int:
        """Return the policy's number."""
        ...

    def sizes(self, shape: Sequence[int]) -> list[Size]:
        """Return the sizes of a tensor's planes in clear."""
        ...

    def encode(self, values: Floats) -> list[Plane]:
        """Return a tensor's planes."""
        ...

    def decode(self, planes: Sequence[Plane], shape: Sequence[int], about: str) -> Floats:
        """Return a tensor. Raises `Invalid` about the tensor `about` for bytes that no encoder writes."""
        ...


def codec(name: str, rank: int = 0, share: float = 0.0) -> Codec:
    """Return a codec by its name in a policy, with the policy's rank and share where it has one."""
    if name == "low-rank":
        return Factors(min(max(rank, 1), MAX_RANK))
    if name == "top-k":
        return Sparse(min(max(round(share * CHUNK), 1), CHUNK))
    if name not in _BLOCKS:
        raise Invalid(f"no codec is called {name!r}", reason=reasons.REASON_BAD_SPEC)
    return _BLOCKS[name]


def most_bytes(how: Codec, layout: Layout) -> int:
    """Return the most bytes that a file of this layout can have."""
    return (
        _HEAD_BYTES
        + 4
        + MAX_NOTE_BYTES
        + sum(size.coded + 4 for _, shape in layout.values() for size in how.sizes(shape))
    )


def write_coded(how: Codec, layout: Layout, load: Callable[[str], Floats], path: Path, note: bytes = b"") -> None:
    """Write the tensors that `load` returns by name, one in memory at a time, behind a note."""
    for _ in coding(how, layout, load, path, note):
        pass


def coding(
    how: Codec, layout: Layout, load: Callable[[str], Floats], path: Path, note: bytes = b""
) -> Iterator[tuple[str, Floats, list[Plane]]]:
    """Do as `write_coded`, and yield of each tensor name, numbers and planes, of which a reader of the file decodes it."""
    with path.open("wb") as file:
        file.write(head(how, note))
        for name in sorted(layout):
            values = load(name)
            planes = how.encode(values)
            file.write(packed(planes))
            yield name, values, planes


def head(how: Codec, note: bytes = b"") -> bytes:
    """Return what comes before the tensors of a file, which follow by name."""
    return _WITH_NOTE + _about(how) + len(note).to_bytes(4, "little") + note if note else _PREFIX + _about(how)


def read_coded(how: Codec, layout: Layout, source: Path | bytes) -> Iterator[tuple[str, Floats]]:
    """Yield (name, δ) of a file by name, one tensor in memory at a time.

    Raises `Invalid` (BAD_HEADER, OVERSIZED, NON_FINITE) for anything that no encoder writes, at the first place where it shows.
    """
    try:
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            _read_head(how, file)
            begin = file.tell()
            size, limit = file.seek(0, 2), most_bytes(how, layout)
            if size > limit:
                raise Invalid(
                    f"the file has {size} bytes, at most {limit} are possible", reason=reasons.REASON_OVERSIZED
                )
            file.seek(begin)
            for name in sorted(layout):
                shape = layout[name][1]
                yield name, how.decode(read_planes(file, how.sizes(shape), name), shape, name)
            if file.tell() != size:
                raise bad_code(f"the file has {size - file.tell()} bytes behind its last tensor")
    except OSError as error:
        raise NotFound(f"cannot read {source!r}: {error.strerror}") from error


def read_note(how: Codec, path: Path) -> bytes:
    """Return the note of a file, empty where it has none. Raises `Invalid` (BAD_HEADER) for a file that is none."""
    with path.open("rb") as file:
        return _read_head(how, file)


def _about(how: Codec) -> bytes:
    return bytes([how.tag]) + how.parameter.to_bytes(4, "little")


def _read_head(how: Codec, file: BinaryIO) -> bytes:
    """Read up to the first tensor; returns the note."""
    head = file.read(_HEAD_BYTES)
    if not head.startswith((_PREFIX, _WITH_NOTE)) or len(head) < _HEAD_BYTES:
        raise bad_code("the file is not a coded pseudo-gradient")
    if head[len(_PREFIX) :] != _about(how):
        raise bad_code(f"the file is of another codec or parameter than {how.name} with {how.parameter}")
    if head.startswith(_PREFIX):
        return b""
    length = int.from_bytes(file.read(4), "little")
    note = file.read(length) if 0 < length <= MAX_NOTE_BYTES else b""
    if not note or len(note) != length:
        raise bad_code(f"the file's note has not the {length} bytes that it says, or more than {MAX_NOTE_BYTES}")
    return note
