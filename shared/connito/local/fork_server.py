"""A process that has imported torch and transformers and forks services on request.

Importing them costs about five seconds of CPU and 400 MB per process; a fork costs milliseconds and shares the pages.
That is safe as long as this process has never run a tensor operation and has a single thread: a child inherits memory
but no threads, so a lock that another thread held would stay locked for ever. Both are checked before the first fork.

The supervisor speaks over a `SOCK_SEQPACKET` pair, one JSON object a packet, with the child's stdout and stderr as file
descriptors beside it:

    -> {"op": "spawn", "name", "module", "argv", "env", "cwd"} + [stdout, stderr]
    <- {"event": "ready"} once, {"event": "started", "name", "pid"}, {"event": "exited", "name", "pid", "code"}

When the supervisor's end closes, however that came about, everything forked here is killed.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from connito.errors import ConnitoError, Fatal
from connito.render import formats

# What a model-side service ends up importing, in the order that shares most.
PRELOAD = (
    "torch",
    "safetensors.torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2_moe.modeling_qwen2_moe",
    "grpc",
    "nats",
    "minio",
    "structlog",
    "stamina",
    "prometheus_client",
    "pydantic_settings",
    "connito.service.runner",
    "connito.service.engine",
    "connito.moe.training",
    "connito.moe.evaluate",
    "connito.moe.resident",
    "connito.base.loading",
)
PACKET_BYTES = 1 << 18
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when `parent` ends, so that nothing outlives a crash.

    Exits at once when it has ended before the request could be made.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def preload(modules: Sequence[str]) -> None:
    """Import `modules` and freeze what they made, so that the collector does not unshare the pages in the children."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()


def check_fork_safe(tasks: Path = Path("/proc/self/task")) -> None:
    """Raise `Fatal` when this process has more than one thread, because a fork would then lose locks."""
    threads = len(list(tasks.iterdir())) if tasks.is_dir() else 1
    if threads != 1:
        raise Fatal(
            f"the process that forks services has {formats.count(threads, 'thread')} after its imports, so forking is not safe; "
            "set OPENBLAS_NUM_THREADS=1"
        )


class ForkServer:
    """Event loop that spawns on request, reports exits and ends with the supervisor."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.children: dict[int, str] = {}
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def run(self) -> None:
        """Serve until the supervisor's end of the socket closes."""
        signal.signal(signal.SIGCHLD, lambda *_: os.write(self._wake_write, b"."))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._send({"event": "ready"})
        try:
            while self._serve_once():
                pass
        finally:
            self._kill_all()

    def _serve_once(self) -> bool:
        readable, _, _ = select.select([self.control.fileno(), self._wake_read], [], [])
        if self._wake_read in readable:
            os.read(self._wake_read, 4096)
            self._reap()
        if self.control.fileno() not in readable:
            return True
        data, descriptors, _, _ = socket.recv_fds(self.control, PACKET_BYTES, 2)
        if not data:
            return False
        self._spawn(json.loads(data), descriptors)
        return True

    def _spawn(self, request: dict[str, Any], descriptors: list[int]) -> None:
        parent, pid = os.getpid(), os.fork()
        if pid == 0:
            _become(request, descriptors, parent, close=self._close_inherited)
        with suppress(OSError):  # The child does the same; whoever comes first, its group is there from now on.
            os.setpgid(pid, pid)
        for descriptor in descriptors:
            os.close(descriptor)
        self.children[pid] = str(request["name"])
        self._send({"event": "started", "name": request["name"], "pid": pid})

    def _close_inherited(self) -> None:
        self.control.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _reap(self) -> None:
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            name = self.children.pop(pid)
            self._send({"event": "exited", "name": name, "pid": pid, "code": os.waitstatus_to_exitcode(status)})

    def _kill_all(self) -> None:
        for pid in self.children:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _send(self, event: dict[str, Any]) -> None:
        try:
            self.control.send(json.dumps(event).encode())
        except OSError:  # The supervisor is gone; the next receive says so and ends the loop.
            return


def _become(request: dict[str, Any], descriptors: list[int], parent: int, close: Callable[[], None]) -> None:
    """Turn a fresh fork into the service. Never returns."""
    code = 1
    try:
        os.setpgid(0, 0)
        die_with_parent(parent)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        close()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptors[0], 1)
        os.dup2(descriptors[1], 2)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        sys.argv = [request["module"], *request["argv"]]
        code = run_module(request["module"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_module(module: str) -> int:
    """Run `module` as `python -m` would and return what its process would exit with."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=False)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except ConnitoError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(parent: int, descriptor: int, modules: Sequence[str] = PRELOAD) -> None:
    """Run the forking process: `parent` is the supervisor, `descriptor` our end of the socket pair."""
    die_with_parent(parent)
    preload(modules)
    check_fork_safe()
    ForkServer(socket.socket(fileno=descriptor)).run()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), tuple(sys.argv[3:]) or PRELOAD)
