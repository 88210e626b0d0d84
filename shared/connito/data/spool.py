"""Sequences of records on disk, so that text of any size takes a few bytes of memory for each document."""

from __future__ import annotations

import os
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar, overload

T = TypeVar("T")
S = TypeVar("S")
_BUFFER = 1 << 20


class Records(Sequence[T]):
    """Some records of a spool, in an order of their own, by index; a record may be there several times."""

    def __init__(self, spool: Spool[T], indices: Iterable[int]) -> None:
        self._spool, self.indices = spool, array("Q", indices)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> Records[T]: ...

    def __getitem__(self, index: int | slice) -> T | Records[T]:
        return self.take(range(len(self))[index]) if isinstance(index, slice) else self._spool.read(self.indices[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._spool.read, self.indices)

    def take(self, places: Iterable[int]) -> Records[T]:
        """Return the records at these places."""
        return Records(self._spool, (self.indices[place] for place in places))

    def reordered(self, indices: Iterable[int]) -> Records[T]:
        """Return records of the same spool by their indices in it."""
        return Records(self._spool, indices)

    def mapped(self, function: Callable[[T], S]) -> Mapped[T, S]:
        """Return the same sequence seen through a function, which is called at each access."""
        return Mapped(self, function)


class Mapped(Sequence[S], Generic[T, S]):
    """A sequence through a function."""

    def __init__(self, records: Sequence[T], function: Callable[[T], S]) -> None:
        self._records, self._function = records, function

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> S: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[S]: ...

    def __getitem__(self, index: int | slice) -> S | Sequence[S]:
        if isinstance(index, slice):
            return Mapped(self._records[index], self._function)
        return self._function(self._records[index])

    def __iter__(self) -> Iterator[S]:
        return map(self._function, self._records)


class Spool(Generic[T]):
    """Records appended to a temporary file that ends with the process. `encode` and `decode` turn them into bytes and back."""

    def __init__(self, encode: Callable[[T], bytes], decode: Callable[[bytes], T]) -> None:
        self._encode, self._decode = encode, decode
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with what refers to it
        weakref.finalize(self, self._file.close)
        self._waiting = bytearray()
        self._ends = array("Q", [0])

    def append(self, record: T) -> int:
        """Add a record and return its index."""
        self._waiting += self._encode(record)
        self._ends.append(self._file.tell() + len(self._waiting))
        if len(self._waiting) > _BUFFER:
            self._flush()
        return len(self._ends) - 2

    def read(self, index: int) -> T:
        """Return a record."""
        self._flush()
        start, end = self._ends[index], self._ends[index + 1]
        return self._decode(os.pread(self._file.fileno(), end - start, start))

    def _flush(self) -> None:
        if self._waiting:
            self._file.write(self._waiting)
            self._waiting = bytearray()
