"""Progress of this miner in its private work folder: enough to continue after a `kill -9` at any point.

    <work_dir>/lock
    <work_dir>/miner                               the public key that works here
    <work_dir>/<run>/<cycle>/progress.json        one small document, replaced atomically
    <work_dir>/<run>/receipts/<cycle>-<sequence>.checkpoint   for `connito audit --receipt`
    <work_dir>/<run>/<cycle>/artifact.safetensors  never changed once progress.json names its digest; coded and
                                                  locked, by the run's rules
    <work_dir>/<run>/left/<cycle>.safetensors      what coding left out (`services.trainer.feedback`)

The order of writes carries the guarantee: the artifact is on disk before `progress.json` names it, and it is named
before anything about it is said. So whatever was committed to can be opened.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from connito.errors import Fatal, Invalid
from connito.runtime import logs
from connito.runtime.host import HOST, Disk
from connito.v1.run_pb2 import IngressHead
from pydantic import TypeAdapter

log = logs.get_logger("miner")


@dataclass(frozen=True)
class CycleProgress:
    """One cycle, as far as this miner got. `artifact` and `commitment` are hex digests, empty until there is one."""

    cycle: int
    miner: str
    base_state: str = ""
    artifact: str = ""
    size: int = 0
    # Of an upload that is locked: the key in hex, and the digest of what is inside.
    key: str = ""
    content: str = ""
    commitment: str = ""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    said: bool = False
    committed: bool = False
    revealed: bool = False
    told: tuple[str, ...] = ()
    # Where what was said stands in INGRESS, until the committer's receipt for it is kept.
    unreceipted: tuple[int, ...] = ()
    # The same, for good: what is answered has an answer named after it.
    places: tuple[int, ...] = ()
    # Losses of what the miner held back, the first before any step.
    evaluated: tuple[float, ...] = ()


Progress = Mapping[int, CycleProgress]
_FORM = TypeAdapter(CycleProgress)


class Ledger:
    """Reads and writes progress. One process at a time may hold a work folder."""

    def __init__(self, work_dir: Path, miner: str, disk: Disk = HOST.disk) -> None:
        """Lock `work_dir`. Raises `Fatal` when another trainer holds it or it cannot be written."""
        self.work_dir, self.miner, self._disk = work_dir, miner, disk
        self._known: dict[str, dict[int, CycleProgress]] = {}
        try:
            work_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(work_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                disk.write(work_dir / "miner", miner.encode())
            except BaseException:
                self.close()
                raise
        except BlockingIOError as error:
            raise Fatal(
                f"another trainer works in {work_dir}: stop it, or give this one a folder with CONNITO_WORK_DIR"
            ) from error
        except OSError as error:
            raise Fatal(f"cannot use the work folder {work_dir}: {error.strerror}; set CONNITO_WORK_DIR") from error

    def close(self) -> None:
        """Let another process have the folder."""
        os.close(self._lock)

    def progress(self, run: str) -> Progress:
        """Return the recorded progress of a run, by cycle."""
        if run not in self._known:
            found = [self._read(path) for path in (self.work_dir / run).glob("*/progress.json")]
            self._known[run] = {item.cycle: item for item in found if item is not None and item.miner == self.miner}
        return self._known[run]

    def _read(self, path: Path) -> CycleProgress | None:
        """Return a cycle's progress. A damaged file is laid aside: the cycle begins anew, and without the salt of what it had
        committed to is over for this miner.
        """
        try:
            return _present(read_progress(path), path.parent)
        except Invalid as error:
            log.error("damaged progress of a cycle is laid aside", file=str(path), error=str(error))
            path.replace(path.with_suffix(".damaged"))
            return None

    def cycle(self, run: str, cycle: int) -> CycleProgress:
        """Return one cycle's progress; a blank one if nothing was done yet."""
        return self.progress(run).get(cycle, CycleProgress(cycle, self.miner))

    def update(self, run: str, cycle: int, **changes: object) -> CycleProgress:
        """Change fields of a cycle's progress, on disk first."""
        changed = replace(self.cycle(run, cycle), **changes)  # type: ignore[arg-type]
        folder = self.folder(run, cycle)
        self._disk.write(folder / "progress.json", json.dumps(dataclasses.asdict(changed), indent=1).encode())
        self.progress(run)
        self._known[run][cycle] = changed
        return changed

    def folder(self, run: str, cycle: int) -> Path:
        """Return the folder of a cycle, made when it is not there."""
        folder = self.work_dir / run / str(cycle)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder

    def artifact_path(self, run: str, cycle: int) -> Path:
        """Return the path of a cycle's result."""
        return self.folder(run, cycle) / "artifact.safetensors"

    def said(self, run: str, cycle: int, sequence: int, **changes: object) -> None:
        """Note that something was said, where it stands in INGRESS, and that its receipt is still to be kept."""
        mine = self.cycle(run, cycle)
        places = {"unreceipted": (*mine.unreceipted, sequence), "places": (*mine.places, sequence)}
        self.update(run, cycle, **places, **changes)

    def keep_receipt(self, run: str, cycle: int, receipt: IngressHead, covered: Sequence[int]) -> None:
        """Keep a receipt of the committer's for what it covers. It outlives its cycle's folder."""
        path = self.work_dir / run / "receipts" / f"{cycle}-{covered[-1]}.checkpoint"
        path.parent.mkdir(exist_ok=True, mode=0o700)
        self._disk.write(path, receipt.checkpoint.encode())
        self.settle(run, cycle, covered)

    def settle(self, run: str, cycle: int, places: Collection[int], *told: str) -> None:
        """Look for no receipt any more for what stands there, or was to stand there; note what was told of it."""
        mine = self.cycle(run, cycle)
        left = tuple(sequence for sequence in mine.unreceipted if sequence not in places)
        self.update(run, cycle, unreceipted=left, told=(*mine.told, *told))

    def keep_artifact(self, run: str, cycle: int, draft: Path) -> Path:
        """Make a finished draft the cycle's artifact: synced, then renamed, so that it is whole or not there."""
        path = self.artifact_path(run, cycle)
        self._disk.keep(draft, path)
        return path

    def prune(self, run: str, before: int) -> None:
        """Forget the cycles before `before`: their results are settled and may be large."""
        for cycle in [known for known in self.progress(run) if known < before]:
            shutil.rmtree(self.work_dir / run / str(cycle), ignore_errors=True)
            del self._known[run][cycle]


def read_progress(path: Path) -> CycleProgress:
    """Read a `progress.json`. Raises `Invalid` naming the file when it is not one, and `OSError` where it cannot be read."""
    try:
        return _FORM.validate_json(path.read_bytes())
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise Invalid(f"{path} is not a miner's progress ({why}); remove its folder to skip that cycle") from error


def _present(progress: CycleProgress, folder: Path) -> CycleProgress:
    """Return the same, without an artifact that somebody has removed."""
    path = folder / "artifact.safetensors"
    if not progress.artifact or (path.exists() and path.stat().st_size == progress.size):
        return progress
    return replace(progress, artifact="", size=0, commitment="")
