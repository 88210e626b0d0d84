"""A witness of logs: follow them, cosign each head that extends what was cosigned before, and refuse a second history.

A witness needs nothing but the right to read, and keeps one file a run: the last checkpoint that it cosigned. Whoever holds such
a file can hold any copy of the log against it (`connito audit --checkpoint`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from connito.bus.follow import CaughtUp
from connito.errors import Invalid, Retry, VerificationFailed
from connito.protocol.rules import checked
from connito.runtime.host import Disk
from connito.wire.checkpoint import Checkpoint
from connito.wire.fact import Record
from connito.wire.facts import RunFacts
from connito.wire.heads import LogTrees
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import Roster

# (run, what was cosigned)
Tell = Callable[[str, Checkpoint], None]


@dataclass
class Witness:
    """Memory of a witness: `folder` holds `<run>.checkpoint`, and `<run>.refused` for a head that it would not cosign."""

    folder: Path
    identity: Identity
    roster: Roster
    tell: Tell
    clock: Callable[[], int]
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log = Log(self.roster, LogTrees())
        # Runs whose remembered checkpoint was met again in the log that is read now.
        self._met: set[str] = set()

    async def watch(self, items: AsyncGenerator[Record | CaughtUp, None], *, once: bool) -> int:
        """Take in what is followed, until cancelled or, with `once`, up to what was stored at the start; return how many heads
        were cosigned. Raises `VerificationFailed` naming the run of which a second history was shown.
        """
        count = 0
        async with aclosing(items):
            async for item in items:
                if isinstance(item, CaughtUp):
                    self._ended_early()
                    if once:
                        break
                    continue
                with suppress(Invalid):
                    self._log.apply(item)
                run = item.subject.split(".")[2]
                if run in self._log.runs:
                    count += self._advance(self._log.runs[run])
        return count

    def _advance(self, facts: RunFacts) -> int:
        trees, count = self._log.trees, 0
        assert trees is not None
        while checked(facts) and (fact := facts.head(trees.of(facts.run).number + 1)) is not None:
            try:
                checkpoint = trees.checkpoint(facts, fact.key.cycle)
                count += self._cosign(facts.run, checkpoint)
            except Retry:
                break
            except Invalid as error:
                self.disk.write(self.folder / f"{facts.run}.refused", fact.message.checkpoint.encode())
                raise VerificationFailed(
                    f"{facts.run}: {error}; not cosigned: two histories of this run were shown, keep {self.folder}"
                ) from error
        return count

    def _cosign(self, run: str, checkpoint: Checkpoint) -> bool:
        """Cosign a checkpoint that is newer than the remembered one. Raises `Invalid` for one that cannot follow it."""
        before = self._remembered(run)
        if before is not None and run not in self._met:
            if before.origin != checkpoint.origin:
                raise Invalid(f"its log is {checkpoint.origin}, the one seen before was {before.origin}")
            if checkpoint.size < before.size:
                return False
            if (checkpoint.size, checkpoint.root) != (before.size, before.root):
                raise Invalid(f"the log's first {before.size} messages are not those seen before")
            self._met.add(run)
            return False
        self._met.add(run)
        cosigned = checkpoint.cosigned(self.identity, self.clock() // 1000)
        self.disk.write(self._path(run), cosigned.note.encode())
        self.tell(run, cosigned)
        return True

    def _ended_early(self) -> None:
        """Raise `VerificationFailed` for a run of which less is there than was seen before."""
        for path in self.folder.glob("*.checkpoint"):
            run = path.stem
            if run in self._log.runs and run not in self._met:
                raise VerificationFailed(f"{run}: the log ends before the head that was cosigned; keep {path}")

    def _remembered(self, run: str) -> Checkpoint | None:
        path = self._path(run)
        return Checkpoint.parse(path.read_text()) if path.exists() else None

    def _path(self, run: str) -> Path:
        return self.folder / f"{run}.checkpoint"
