"""The folder that `connito up` owns: who runs in it, where the servers are, and what an interrupted run left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from connito.errors import Invalid, NotFound, Retry
from connito.files import write_durably


@dataclass(frozen=True)
class Platform:
    """The addresses and keys of a platform that runs here, for other commands. The file is readable by its owner only."""

    pid: int
    nats_url: str
    s3_endpoint: str
    s3_access_key: str
    s3_secret_key: str = field(repr=False)
    run: str = ""
    ready: bool = False
    finished: bool = False
    error: str = ""


# Folders of the servers and services.
_PRIVATE = ("accounts", "cache", "cache-miners", "keys", "logs", "miners", "nats", "objects", "ports", "runs", "shelf")


def default_data_dir() -> Path:
    """Return `CONNITO_DATA_DIR`, or `.connito/` in the current folder."""
    return Path(os.environ.get("CONNITO_DATA_DIR") or ".connito")


@dataclass(frozen=True)
class DataDir:
    """Paths inside the data directory."""

    root: Path

    @classmethod
    def open(cls, root: Path | None) -> DataDir:
        """Make the folder where it is missing. Raises `Invalid` naming it when that cannot be done."""
        path = cls.at(root).root
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise Invalid(
                f"the name of the data directory {path} is not in UTF-8; choose another by --data-dir"
            ) from error
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            (path / "logs").mkdir(exist_ok=True, mode=0o700)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it may not be read and written by this user")
        except OSError as error:
            why = "it is a file, or a link to nowhere" if isinstance(error, FileExistsError) else error.strerror
            raise Invalid(f"cannot use the data directory {path}: {why}; choose another by --data-dir") from error
        return cls(path)

    @classmethod
    def at(cls, root: Path | None) -> DataDir:
        """Return the folder as it is, there or not, for who only reads."""
        try:
            return cls((root or default_data_dir()).absolute())
        except FileNotFoundError as error:
            raise Invalid("the current folder is gone; change into one that is there") from error

    @property
    def keys(self) -> Path:
        """Return seeds, one file a name, mode 0600."""
        return self.root / "keys"

    @property
    def roster(self) -> Path:
        """Return the path of the roster, the keys of each role."""
        return self.root / "roster.json"

    @property
    def logs(self) -> Path:
        """Return one file a service."""
        return self.root / "logs"

    @property
    def cache(self) -> Path:
        """Return the artifact cache of the services, on one file system with the base, so that linking is possible."""
        return self.root / "cache"

    @property
    def report(self) -> Path:
        """Return the report of the last run."""
        return self.root / "report.json"

    @property
    def pids(self) -> Path:
        """Return the path of the running processes: `{name: {"pid", "module", "restarts"}}`."""
        return self.root / "pids.json"

    @property
    def platform_file(self) -> Path:
        """Return the path of the file with the servers' addresses."""
        return self.root / "platform.json"

    @property
    def threads(self) -> int:
        """Return threads of each computation here, 0 where nobody said: sums come out to the bit only with as many."""
        try:
            return int((self.root / "threads").read_text())
        except (OSError, ValueError):
            return 0

    def keep_threads(self, threads: int) -> None:
        """Say for later how many threads a computation had."""
        write_durably(self.root / "threads", f"{threads}\n")

    def close_to_others(self) -> None:
        """Let only the owner into what lies here. The folder itself may be one that was there before, for other things too."""
        for folder in self.root.iterdir():
            if folder.name in _PRIVATE and folder.is_dir():
                folder.chmod(0o700)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder. Raises `Retry` naming the process that already does; the kernel lets go when we die."""
        with (self.root / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise Retry(
                    f"another `connito up` (process {self.owner() or 'unknown'}) runs in {self.root}; stop it with "
                    f"`connito down --data-dir {shlex.quote(str(self.root))}`, or choose another --data-dir"
                ) from error
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
            yield

    def owner(self) -> int | None:
        """Return the process that holds the folder; None if nobody does."""
        path = self.root / "lock"
        if not path.exists():
            return None
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                text = file.read().strip()
                return int(text) if text.isdigit() else None
        return None

    def write_platform(self, platform: Platform) -> None:
        """Publish where the platform is (atomically, mode 0600)."""
        write_durably(self.platform_file, json.dumps(asdict(platform), indent=1) + "\n", 0o600)

    def read_platform(self) -> Platform | None:
        """Return the platform that `write_platform` wrote last, running or not."""
        try:
            return Platform(**json.loads(self.platform_file.read_text()))
        except PermissionError:
            raise  # Whether anything runs there is for its owner to see.
        except (OSError, ValueError, TypeError):
            return None

    def running(self) -> Platform:
        """Return the platform that runs here. Raises `NotFound` with the command that starts one."""
        platform = self.read_platform()
        if platform is None or self.owner() is None:
            raise NotFound(
                f"nothing runs in {self.root}; start it with "
                f"`connito up --no-wait --data-dir {shlex.quote(str(self.root))}`"
            )
        return platform

    def write_pids(self, processes: Mapping[str, Mapping[str, Any]]) -> None:
        """Publish what runs now."""
        write_durably(self.pids, json.dumps(processes, indent=1, sort_keys=True) + "\n", 0o600)

    def read_pids(self) -> dict[str, dict[str, Any]]:
        """Return the processes that `write_pids` wrote last; empty when nothing runs, or the file is damaged."""
        try:
            rows: dict[str, dict[str, Any]] = json.loads(self.pids.read_text())
            for row in rows.values():
                int(row["pid"]), int(row["restarts"])
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            return {}
        return rows

    def end_leftovers(self) -> list[str]:
        """Kill what an `up` that was itself killed left running; returns the names. Call with the lock held.

        A process is ours only if it still started when pids.json says: numbers are given out again.
        """
        ended = []
        for name, entry in self.read_pids().items():
            pid = int(entry["pid"])
            if entry.get("started") is not None and start_time(pid) == entry["started"]:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                    ended.append(name)
        self.forget(self.pids)
        return ended

    def forget(self, path: Path) -> None:
        """Say that what `path` tells of runs no more. Where nothing can be written it stays: readers ask who holds the folder."""
        with suppress(OSError):
            path.unlink()


def start_time(pid: int) -> int | None:
    """Return the start of a process in clock ticks since boot; None if there is none (or no /proc)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def is_running(pid: int) -> bool:
    """Return whether a process is there and has not ended (one that nobody has waited for has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return False
