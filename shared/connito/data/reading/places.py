"""Find the files that a customer names: a file, a folder, a glob, or an address that fsspec knows."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from connito.data.reading.datasets import choose, hidden
from connito.data.reading.remote import find_remote
from connito.data.reading.rows import Account, Place, Wanted, unreadable
from connito.errors import ConnitoError, NotFound


def find(location: str, root: Path, wanted: Wanted, account: Account) -> list[Place]:
    """Return the files behind a location, in the order of their names. Relative paths are below `root`.

    Raises `NotFound` when nothing is there, `Invalid` for what is no file.
    """
    if "://" in location:
        return find_remote(location, wanted, account)
    path = root / Path(location).expanduser()
    with reachable(str(path)):
        if path.is_dir():
            return _folder(path, wanted, account)
        if path.exists() or path.is_symlink():
            return [_local(path, chosen=True)]
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute patterns
    places = [_local(Path(name), chosen=len(found) == 1) for name in found if Path(name).is_file()]
    if not places:
        what = "nothing matches" if glob.has_magic(str(path)) else "there is no file or folder"
        raise NotFound(f"{what} {path}; relative paths begin at {root.absolute()}")
    return places


@contextmanager
def reachable(name: str) -> Iterator[None]:
    """Turn errors of the file system into one sentence with a remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"{name} is not there any more; was it moved while it was read?") from error
    except PermissionError as error:
        raise unreadable(f"{name} may not be read; allow it, for example with `chmod +r`") from error
    except ConnitoError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and "null" not in str(error):
            raise
        raise unreadable(
            f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}; check the path"
        ) from error


def _local(path: Path, *, chosen: bool = False) -> Place:
    def opened() -> BinaryIO:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise unreadable(f"{path} is a pipe, socket or device, not a file; copy its content into one")
        return path.open("rb")

    return Place(str(path), opened, chosen)


def _folder(path: Path, wanted: Wanted, account: Account) -> list[Place]:
    names = list(_walk(path, account))
    read = choose(names, lambda name: (path / name).read_bytes(), str(path), account, wanted.config, wanted.split)
    return [_local(path / name) for name in read]


def _walk(path: Path, account: Account) -> Iterator[str]:
    """Yield the regular files below a folder by relative path. Links are followed, each folder once."""
    visited: set[str] = set()

    def unseen(_: OSError) -> None:
        account.skipped["folders that may not be read"] += 1

    for folder, folders, files in os.walk(path, onerror=unseen, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:
            folders.clear()
            continue
        visited.add(real)
        below = Path(folder).relative_to(path)
        folders[:] = sorted(name for name in folders if not hidden(name))
        for name in files:
            if (path / below / name).is_file():
                yield (below / name).as_posix()
            else:
                account.skipped["broken links, pipes, sockets or devices"] += 1
