"""Find out which actions of a service ended its process, from the process that comes after it.

What is under way stands in a file beside what the service keeps of the log. A process that finds such notes was preceded by one
that did not end in order. Whether the action did that is told by evidence: what the interpreter writes when native code
crashes, and the kernel's count of processes that it killed for lack of memory. Without evidence somebody may have killed
the process from outside, as an orchestrator or a test does, in the middle of whatever was under way.
"""

from __future__ import annotations

import faulthandler
import json
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from connito.runtime.logs import get_logger

log = get_logger("engine")

# Deaths after which an action is set aside: where the action did it, and where nothing says who did.
BY_ITSELF, UNEXPLAINED = 2, 5
# Seconds for which it is left alone after unexplained ones, doubled with each further one.
FIRST_REST, LAST_REST = 30.0, 600.0
# Bytes that the notes have from the start, one block of a disk: a full one, or a power cut, leaves all of them or those before.
ROOM = 4096
_STATISTICS = Path("/proc/vmstat")


@dataclass
class Death:
    """The number of processes that ended during an action, and what the last one died of, where that is known."""

    by_itself: int = 0
    unexplained: int = 0
    cause: str = ""

    @property
    def set_aside(self) -> str:
        """Return why the action is not tried any more; empty while it is."""
        return f"it ended its process {self.by_itself} times ({self.cause})" if self.by_itself >= BY_ITSELF else ""

    @property
    def rest(self) -> float:
        """Return for how many seconds from the start of the process the action is left alone."""
        beyond = self.unexplained - UNEXPLAINED
        return 0.0 if beyond < 0 else min(LAST_REST, FIRST_REST * 2.0 ** min(beyond, 10))


class Deaths:
    """Notes of one service in `path`; without one, none are made."""

    def __init__(self, path: Path | None, statistics: Path = _STATISTICS) -> None:
        self._path, self._statistics = path, statistics
        self._under_way: dict[str, int] = {}
        self._deaths: dict[str, Death] = {}
        # Closed with these notes at the latest: a process that keeps running must not run out of files.
        self._close: list[Callable[[], object]] = []
        self._notes: int | None = None
        self._length = 0
        if path is not None:
            with suppress(OSError):
                self._begin(path)

    def _begin(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        crash = path.with_suffix(".crash")
        words = (
            crash.read_text(errors="replace").partition("\n")[0].removeprefix("Fatal Python error: ")
            if crash.exists()
            else ""
        )
        with suppress(OSError, ValueError, TypeError, AttributeError):
            noted = json.loads(path.read_text())
            self._deaths = {action: Death(**row) for action, row in noted["deaths"].items()}
            for action, killed in noted["under_way"].items():
                self._died(action, words or ("the kernel was out of memory" if self._killed() > killed else ""))
        # Kept open: the interpreter writes there when nothing else works any more.
        faulthandler.enable(self._open(crash, os.O_TRUNC), all_threads=False)
        self._length = max(ROOM, path.stat().st_size if path.exists() else 0)
        self._notes = self._open(path)
        self._write()

    def _open(self, path: Path, more: int = 0) -> int:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | more, 0o600)
        self._close.append(weakref.finalize(self, os.close, descriptor))
        return descriptor

    def _died(self, action: str, cause: str) -> None:
        death = self._deaths.setdefault(action, Death())
        if cause:
            death.by_itself, death.cause = death.by_itself + 1, cause
        else:
            death.unexplained += 1
        log.warning("the process before ended during this", action=action, **asdict(death))

    def of(self, action: str) -> Death | None:
        """Return how often a process ended during an action; None if none did."""
        return self._deaths.get(action)

    def begin(self, action: str) -> None:
        """Note that an action begins."""
        if self._path is not None:
            self._under_way[action] = self._killed()
            self._write()

    def end(self, action: str) -> None:
        """Note that an action has ended and the process has not."""
        if self._under_way.pop(action, None) is not None:
            self._deaths.pop(action, None)
            self._write()

    def forget(self) -> None:
        """Forget everything: the process ends in order, and whoever starts it again has mended what there was."""
        self._under_way.clear()
        self._deaths.clear()
        self._write()
        if self._close:
            faulthandler.disable()
            self._notes = None
        for close in self._close:
            close()

    def _write(self) -> None:
        """Write without waiting for the disk: a process may end here, and after a power cut nobody is to blame.

        In one call and over what stood there, so that a process ends before it or behind it; a new file for each action would
        cost ten times as much.
        """
        if self._notes is not None:
            noted = {
                "under_way": self._under_way,
                "deaths": {key: asdict(death) for key, death in self._deaths.items()},
            }
            data = json.dumps(noted).encode().ljust(self._length)
            self._length = len(data)
            with suppress(OSError):
                os.pwrite(self._notes, data, 0)

    def _killed(self) -> int:
        """Return how many processes the kernel of this machine has killed for lack of memory."""
        with suppress(OSError, ValueError):
            for line in self._statistics.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0
