"""Names of files, and files that are whole after a crash or a power cut: each has its old content or its new one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# What the system says of writing and syncing an open file, without its name.
_WRITING = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ESTALE,
}  # fmt: skip


def plain_name(name: str) -> bool:
    """Return whether `name` is that of a file and nothing of a path."""
    return 0 < len(name) <= 200 and name.isprintable() and not set(name) & set('/\\:\0"') and name[0] not in ". "


def write_durably(path: Path, content: bytes | str, mode: int = 0o644) -> None:
    """Replace a file, with `mode` less what the umask takes; on disk when this returns. Raises `OSError`."""
    with replacing(path) as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` for its next content, which takes the name when the block ends without an error.

    An `OSError` of the file system names `path`, also where the system does not.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        yield draft
        keep(draft, path)
    except OSError as error:
        # What comes over a network while the content is fetched is an `OSError`, too, and says nothing about this file.
        if error.filename is None and error.errno in _WRITING:
            error.filename = str(path)
        raise
    finally:
        with suppress(FileNotFoundError):
            draft.unlink()


def keep(draft: Path, path: Path) -> None:
    """Give a finished draft its name: content on disk first, then the name, then the folder that holds the name."""
    sync(draft)
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have what a file or a folder holds on disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
