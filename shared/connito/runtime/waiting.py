"""Wait for what is wrong here and now: faults of the environment, by dependency and run.

Whatever meets such a fault tries again, without limit. The wait grows with jitter up to `LONGEST` seconds, and ends as soon as
the dependency answers anybody in this process.
"""

from __future__ import annotations

import asyncio
import errno
import random
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from connito.errors import ConnitoError, Environment, Retry, Unusable
from connito.runtime import metrics
from connito.v1 import reasons_pb2 as reasons

LONGEST = 5.0
# An entry that nobody renews is of something that is not wanted any more.
FORGET_SECONDS = 60.0
DISK = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EIO, errno.EFBIG}
# Those of them that are no want of room: who may not write there now may not later either.
_RIGHTS = {errno.EROFS, errno.EACCES, errno.EPERM}
# What something waits for that fails by itself: nothing around it, but somebody who mends it.
REPAIR = "repair"
# What SQLite says of a disk that is full, failing or not writable, and of a file that another process holds.
_SQLITE = {
    sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM,
}  # fmt: skip
# How a disk is made to take things again, where it is not by freeing space.
_REMEDY = dict.fromkeys((errno.EACCES, errno.EPERM), "let this user write there") | {
    errno.EROFS: "make it writable",
    errno.EIO: "look at the disk's health",
}
_MEMORY = ("out of memory", "not enough memory", "cannot allocate memory")


def here_and_now(error: Exception) -> Environment | None:
    """Return the fault of the environment that an error is, however it was raised; None for one that is about content."""
    if isinstance(error, Environment):
        return error
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Retry(f"this machine is out of memory: {text}; free some, or give the service more", dependency="memory")
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY):
        return Retry(
            f"this machine is out of memory: {text[:300]}; free some, or use smaller batches", dependency="memory"
        )
    if isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in _SQLITE:
        return Retry(f"a file of this machine cannot be used: {text}", dependency="disk")
    if isinstance(error, OSError):
        return of_disk(error, "a file") if error.errno in DISK else Retry(text, dependency="machine")
    return None


def of_rights(error: BaseException | None) -> bool:
    """Return whether an error is that this user may not write there: itself, or what it was raised from."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__
    return isinstance(error, PermissionError) or (error is not None and error.errno in _RIGHTS)


def of_disk(error: OSError, what: str) -> Unusable:
    """Return the fault of a disk that is full, read-only or failing."""
    path, remedy = error.filename or what, _REMEDY.get(error.errno or 0, "free space there")
    return Unusable(
        f"cannot write {path}: {error.strerror}; {remedy}, or point CONNITO_CACHE_DIR elsewhere",
        dependency="disk",
        reason=reasons.REASON_STORE_UNAVAILABLE,
    )


def worded(error: Exception) -> str:
    """Return an error as a sentence: as it is where it was worded for people, else with what kind it is of."""
    return str(error) if isinstance(error, ConnitoError) else f"{type(error).__name__}: {error}"


def delay(after: float, failures: int, spread: Callable[[float, float], float] = random.uniform) -> float:
    """Return how long to wait after so many failures in a row, in seconds: longer each time, and never all at once."""
    longest = max(LONGEST, after) if failures == 0 else LONGEST
    return min(longest, after * 2.0 ** min(failures, 10)) * spread(0.5, 1.0)


@dataclass(frozen=True)
class Wait:
    """An act that cannot be done now: what it is, in which run, what it waits for, and the error in words."""

    what: str
    run: str
    dependency: str
    error: str
    given_up: bool = False
    forget: asyncio.TimerHandle | None = field(default=None, repr=False, compare=False)


class Waiting:
    """The things that wait in one process, each for a dependency in a run."""

    def __init__(self) -> None:
        self._entries: dict[str, Wait] = {}
        # In the order in which they came.
        self._listeners: WeakKeyDictionary[Listener, None] = WeakKeyDictionary()
        self._told: dict[str, float] = {}

    def begin(self, what: str, error: Environment, run: str, seconds: float) -> None:
        """Note that `what` tries again after so many seconds."""
        forget = asyncio.get_running_loop().call_later(seconds + FORGET_SECONDS, self.end, what)
        self._add(Wait(what, run, error.dependency, str(error), forget=forget))

    def give_up(self, what: str, error: Exception, run: str) -> None:
        """Note that `what` is tried again only now and then, until `end` is called or the process ends."""
        self._add(Wait(what, run, REPAIR, worded(error), given_up=True))

    def _add(self, wait: Wait) -> None:
        self.end(wait.what)
        self._entries[wait.what] = wait
        metrics.WAITING.labels(wait.dependency, wait.run).inc()

    def end(self, what: str) -> None:
        """Note that `what` waits no longer."""
        if what in self._entries:
            gone = self._entries.pop(what)
            if gone.forget is not None:
                gone.forget.cancel()
            metrics.WAITING.labels(gone.dependency, gone.run).dec()
            if not any((entry.dependency, entry.run) == (gone.dependency, gone.run) for entry in self.entries()):
                metrics.WAITING.remove(gone.dependency, gone.run)

    def entries(self) -> list[Wait]:
        """Return what waits, from any thread."""
        return list(self._entries.values())

    def listen(self, listener: Listener) -> None:
        """Tell `listener` of every dependency that answers again, for as long as it exists."""
        self._listeners[listener] = None

    def answered(self, dependency: str) -> None:
        """Note that a dependency works; whoever waits for it need not wait longer. Call it in the loop's thread.

        Something that works by half answers one and fails the next: that is passed on once a second.
        """
        now = asyncio.get_running_loop().time()
        lately = 0.0 <= now - self._told.get(dependency, -1.0) < 1.0
        if lately or all(entry.dependency != dependency for entry in self.entries()):
            return
        self._told[dependency] = now
        for listener in list(self._listeners):
            listener.answered(dependency)


class Listener:
    """A party that waits for dependencies."""

    def answered(self, dependency: str) -> None:
        """Try at once what waits for a dependency that works again."""
        raise NotImplementedError


WAITING = Waiting()
