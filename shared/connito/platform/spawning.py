"""Starting children that die with this process, and what their logs say at the end.

Linux ties a child's death signal to the thread that forked it, not to the process: a worker thread that ends would take
its children along. So one thread, which never ends, starts them all.
"""

from __future__ import annotations

import ctypes
import os
import queue
import re
import signal
import subprocess
import threading
from concurrent.futures import Future
from pathlib import Path

from connito.errors import Fatal

_requests: queue.Queue[tuple[list[str], int, Path, bool, Future[subprocess.Popen[bytes]]]] = queue.Queue()
_spawner: threading.Thread | None = None
_guard = threading.Lock()
_PR_SET_PDEATHSIG = 1


def spawn(command: list[str], log: int, folder: Path, die_with_parent: bool) -> subprocess.Popen[bytes]:
    """Start `command` in a session of its own, output to the descriptor `log`. Raises `Fatal` if it cannot start."""
    global _spawner
    with _guard:
        if _spawner is None or not _spawner.is_alive():
            _spawner = threading.Thread(target=_spawn_for_ever, name="server-spawner", daemon=True)
            _spawner.start()
    answer: Future[subprocess.Popen[bytes]] = Future()
    _requests.put((command, log, folder, die_with_parent, answer))
    return answer.result()


def _spawn_for_ever() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    while True:
        command, log, folder, die_with_parent, answer = _requests.get()
        parent = os.getpid()

        def tie(parent: int = parent) -> None:
            if hasattr(libc, "prctl"):
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                # Ctrl-C in the terminal is for the command line; it ends its servers itself, in order.
                start_new_session=True,
                # What servers keep is read by nobody else on this machine.
                umask=0o077,
                preexec_fn=tie if die_with_parent else None,  # noqa: PLW1509 - prctl only
            )
        except OSError as error:
            answer.set_exception(Fatal(f"cannot start {command[0]}: {error.strerror}"))
        else:
            answer.set_result(process)


# How Go programs begin the line that says why they end; a dump of all that they were doing follows.
_WHY = re.compile(r"F\d{4} |panic: |fatal error: |.*\[FTL\] ")


def last_lines(path: Path, count: int = 8) -> str:
    """Return the end of a log, or the lines in it that say why a server ended, indented; empty when there is none."""
    try:
        lines = path.read_text(errors="replace").splitlines()[-1000:]
    except OSError:
        return ""
    return "\n".join(f"  {line}" for line in ([line for line in lines if _WHY.match(line)] or lines)[-count:])
