"""Scratch of one process: a folder that it holds while it lives, and that the next one beside it removes.

Whoever is killed removes nothing. So temporary files lie where a process that comes later looks, and not in the machine's own
folder for them, in which nobody knows what belonged to whom.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

FOLDER = "scratch"


@contextmanager
def own(beside: Path, name: str) -> Iterator[None]:
    """Let this process's temporary files lie in `beside/scratch` until the block ends; remove those of processes that are gone.

    Where nothing can be written there, the machine's own folder for them is as good as it was.
    """
    before = tempfile.tempdir
    with ExitStack() as held:
        with suppress(OSError):
            tempfile.tempdir = str(_take(beside / FOLDER, name, held))
        try:
            yield
        finally:
            tempfile.tempdir = before


def _take(place: Path, name: str, held: ExitStack) -> Path:
    """Return a new folder in `place`, held and in the end removed by `held`. Raises `OSError`."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(place):
        for left in place.iterdir():
            # Whoever lives holds its folder.
            with suppress(OSError), _locked(left, fcntl.LOCK_NB):
                shutil.rmtree(left)
        mine = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place))
        held.enter_context(_locked(mine))
        held.callback(shutil.rmtree, mine, ignore_errors=True)
    return mine


@contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(descriptor)
