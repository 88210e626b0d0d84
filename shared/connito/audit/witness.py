"""A witness of logs: follow them, cosign each head that extends what was cosigned before, and refuse a second history.

A witness needs nothing but the right to read, and keeps one file a run: the last checkpoint that it cosigned. Whoever holds such
a file can hold any copy of the log against it (`connito audit --checkpoint`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from connito.bus.follow import CaughtUp
from connito.errors import Invalid, Retry, VerificationFailed
from connito.render import formats
from connito.runtime.host import Disk
from connito.runtime.progress import Notify
from connito.service.unbegun import Unbegun
from connito.v1 import run_pb2
from connito.wire.checkpoint import MAX_BYTES, Checkpoint
from connito.wire.fact import Record
from connito.wire.facts import RunFacts
from connito.wire.heads import LogTrees, origin_of
from connito.wire.identity import Identity
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import check_token


@dataclass
class Witness:
    """Memory of a witness: `folder` holds `<run>.checkpoint`, and `<run>.refused` for a head that it would not cosign.

    Raises `Invalid` for a folder that is none, or in which a checkpoint is damaged. `run`: the only one to follow; empty: all.
    """

    folder: Path
    identity: Identity
    roster: Roster
    tell: Notify
    clock: Callable[[], int]
    run: str = ""
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise Invalid(f"{self.folder} is a file; give a folder in which this witness can remember what it cosigned")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._log, self._caught_up = Log(self.roster, LogTrees()), False
        self.cosigned = 0
        paths = [self._path(self.run)] if self.run else sorted(self.folder.glob("*.checkpoint"))
        self._remembered = {path.stem: _read(path) for path in paths if path.exists()}
        # Runs whose remembered checkpoint was met again in the log that is read now.
        self._met: set[str] = set()
        # Runs of which a second history was shown, and what was seen of it: nothing more of them is cosigned.
        self.refused: dict[str, str] = {}
        self._unbegun = Unbegun(Kept())

    async def watch(self, items: AsyncGenerator[Record | CaughtUp, None], *, once: bool) -> None:
        """Take in what is followed, until cancelled or, with `once`, up to what was stored at the start; `cosigned` counts heads.

        A run of which a second history was shown is told of and `refused` from then on; the others go on.
        """
        async with aclosing(items):
            async for item in items:
                if isinstance(item, CaughtUp):
                    self._catch_up()
                    if once:
                        break
                    continue
                for record in self._unbegun.ready(item):
                    facts = self._take(record)
                    # Whether a run was released is known when all of it was read.
                    if facts is not None and self._caught_up:
                        self._attend(facts.run, partial(self._advance, facts))

    def check(self) -> None:
        """Raise `VerificationFailed` naming the runs that were refused."""
        if self.refused:
            raise VerificationFailed("; ".join(self.refused.values()))

    def _attend(self, run: str, work: Callable[[], None]) -> None:
        if run in self.refused:
            return
        try:
            work()
        except VerificationFailed as error:
            self.refused[run] = str(error)
            self.tell(str(error))

    def _take(self, record: Record) -> RunFacts | None:
        with suppress(Invalid):
            self._log.apply(record)
        run = record.subject.split(".")[2]
        with suppress(Invalid):
            # It becomes the name of a file.
            return self._log.runs.get(check_token(run, "run id"))
        return None

    def _catch_up(self) -> None:
        self._caught_up = True
        for facts in list(self._log.runs.values()):
            if facts.archived is None or facts.cycles():
                self._attend(facts.run, partial(self._advance, facts))
            if facts.archived is not None and facts.run not in self._met:
                self._attend(facts.run, partial(self._accept_release, facts, facts.archived))
        for run in sorted(self._remembered.keys() - self._met):
            self._attend(run, partial(self._miss, run))

    def _miss(self, run: str) -> None:
        known = run in self._log.runs
        what = "the log ends before the head that was cosigned" if known else "the log does not hold it"
        raise VerificationFailed(
            f"{run}: {what}; keep {self._path(run)}, and give each platform's witness a folder of its own"
        )

    def _accept_release(self, facts: RunFacts, gone: run_pb2.RunArchived) -> None:
        """Go on without a run whose messages are in the operator's archive. Its heads are still there: raise
        `VerificationFailed` unless the one that was cosigned is among them."""
        run, before = facts.run, self._remembered.get(facts.run)
        where = f"its operator has released it into an archive with SHA-256 {gone.digest}"
        if before is None:
            self.tell(f"{run}: not cosigned, {where}, before this witness saw it")
            return
        numbered = [facts.head(number) for number in range(1, facts.next_head)]
        heads = [Checkpoint.parse(head.message.checkpoint) for head in numbered if head is not None]
        if before.origin != origin_of(facts) or (before.size, before.root) not in [
            (one.size, one.root) for one in heads
        ]:
            raise VerificationFailed(
                f"{run}: {where}, and the head that was cosigned is not among those in the log; keep {self._path(run)}"
            )
        self._met.add(run)
        self.tell(f"{run}: {where}; `connito audit {run} --from` that file `--checkpoint {self._path(run)}` checks it")

    def _advance(self, facts: RunFacts) -> None:
        trees = self._log.trees
        assert trees is not None
        while (fact := facts.head(trees.of(facts.run).number + 1)) is not None:
            try:
                self._cosign(facts.run, trees.checkpoint(facts, fact.key.cycle))
            except Retry:
                break
            except Invalid as error:
                self.disk.write(self.folder / f"{facts.run}.refused", fact.message.checkpoint.encode())
                raise VerificationFailed(
                    f"{facts.run}: {error}; not cosigned: two histories of this run were shown, keep {self.folder}"
                ) from error

    def _cosign(self, run: str, checkpoint: Checkpoint) -> None:
        """Cosign a checkpoint that is newer than the remembered one. Raises `Invalid` for one that cannot follow it."""
        before = self._remembered.get(run)
        if before is not None and run not in self._met:
            if before.origin != checkpoint.origin:
                raise Invalid(f"its log is {checkpoint.origin}, the one seen before was {before.origin}")
            if checkpoint.size < before.size:
                return
            if (checkpoint.size, checkpoint.root) != (before.size, before.root):
                raise Invalid(f"the log's first {formats.count(before.size, 'message')} are not those seen before")
            self._met.add(run)
            return
        self._met.add(run)
        cosigned = checkpoint.cosigned(self.identity, self.clock() // 1000)
        self.disk.write(self._path(run), cosigned.note.encode())
        self._remembered[run] = cosigned
        self.cosigned += 1
        self.tell(f"{run}: {formats.count(cosigned.size, 'message')}, root {cosigned.root.hex()[:16]}… cosigned")

    def _path(self, run: str) -> Path:
        return self.folder / f"{check_token(run, 'run id')}.checkpoint"


def _read(path: Path) -> Checkpoint:
    """Return what a file of ours remembers; it is no bigger than a checkpoint can be."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    try:
        return Checkpoint.parse(data.decode())
    except (Invalid, ValueError) as error:
        raise Invalid(f"{path} is damaged: {error}; put a copy of it there") from error
