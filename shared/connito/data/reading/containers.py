"""Containers that files are packed into: gzip, bzip2, xz, Zstandard, zip and tar, each read as a stream."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, cast

from connito.data.reading.kinds import NotText
from connito.data.reading.rows import unreadable

Choose = Callable[[list[str], Callable[[str], bytes]], list[str]]
DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)


def unpacked(stream: BinaryIO, kind: str, name: str) -> BinaryIO:
    """Return the stream of what is compressed in `stream`."""
    if kind == "zstd":
        try:
            import zstandard
        except ImportError as error:
            raise unreadable(
                f"{name} is compressed with Zstandard: pip install 'connito[data]', or unpack it"
            ) from error
        return cast(
            BinaryIO,
            io.BufferedReader(_Zstandard(stream, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj)),
        )
    if kind == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=stream, mode="rb"))
    return cast(BinaryIO, bz2.BZ2File(stream) if kind == "bzip2" else lzma.LZMAFile(stream))


class _Zstandard(io.RawIOBase):
    """Frames of Zstandard one after the other. Unlike the package's own stream, it notices an end inside a frame."""

    def __init__(self, stream: BinaryIO, begin: Callable[[], Any]) -> None:
        self._stream, self._begin, self._frame = stream, begin, begin()
        self._waiting, self._done, self._started = b"", io.BytesIO(), False

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer. Raises `EOFError` where the last frame is cut off."""
        while not (data := self._done.read(len(buffer))):
            if self._frame.eof:
                self._waiting, self._frame, self._started = self._frame.unused_data, self._begin(), False
            raw = self._waiting or self._stream.read(1 << 16)
            if not raw:
                if self._started:
                    raise EOFError("the last frame has no end")
                return 0
            self._waiting, self._started = b"", True
            self._done = io.BytesIO(self._frame.decompress(raw))
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def damage(name: str) -> Iterator[None]:
    """Turn the errors of damaged archives into one sentence."""
    try:
        yield
    except DAMAGE as error:
        raise unreadable(f"{name} is damaged or cut off ({error}); get the file again") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("zstd", "zstandard", "backend_c"):
            raise
        raise unreadable(f"{name} is damaged or cut off ({error}); get the file again") from error


class Prefixed(io.RawIOBase):
    """A stream that cannot go back, with what was read of it in front again."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = io.BytesIO(head), rest

    def readable(self) -> bool:
        """Return true."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the head, then from the rest."""
        data = self._head.read(len(buffer)) or self._rest.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _rewinds(stream: BinaryIO) -> bool:
    """Tell whether a stream goes back without doing everything again, as that of a compressed file would."""
    return stream.seekable() and not isinstance(stream, (gzip.GzipFile, bz2.BZ2File, lzma.LZMAFile))


def beginning(stream: BinaryIO, size: int) -> tuple[bytes, BinaryIO]:
    """Return the first bytes of a stream, and a stream that begins with them again."""
    parts, found = [], 0
    while found < size and (part := stream.read(size - found)):
        parts.append(part)
        found += len(part)
    head = b"".join(parts)
    if _rewinds(stream):
        stream.seek(0)
        return head, stream
    return head, cast(BinaryIO, io.BufferedReader(Prefixed(head, stream)))


def seekable(stream: BinaryIO, stack: ExitStack) -> BinaryIO:
    """Return the stream, or a copy of it in a temporary file where it cannot seek."""
    if _rewinds(stream):
        return stream
    copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - closed by the stack
    shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return cast(BinaryIO, copy)


def tar_members(stream: BinaryIO) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name, stream) of each file in a tar, in the order in which they stand there."""
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            if member.isfile() and (file := tar.extractfile(member)) is not None:
                yield member.name, cast(BinaryIO, io.BufferedReader(Prefixed(b"", cast(BinaryIO, file))))


def zip_members(stream: BinaryIO, name: str, stack: ExitStack, choose: Choose) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name, stream) of the files in a zip that `choose` takes, given their names and how to read one. Raises `NotText`
    for documents that are zip inside."""
    with zipfile.ZipFile(seekable(stream, stack)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
        if "[Content_Types].xml" in entries or next(iter(entries), "") == "mimetype":
            raise NotText(name, "an Office document or book: save it as text or CSV")
        if "data.pkl" in {entry.rpartition("/")[2] for entry in entries}:
            raise NotText(name, "a PyTorch file")
        if any(entry.flag_bits & 1 for entry in entries.values()):
            raise unreadable(f"{name} is encrypted; unpack it first")
        for chosen in choose(list(entries), archive.read):
            with archive.open(entries[chosen]) as opened:
                yield chosen, cast(BinaryIO, opened)
