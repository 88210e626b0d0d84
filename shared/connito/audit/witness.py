"""A witness of logs: follow them, cosign each head that extends what was cosigned before, and refuse a second history.

A witness needs nothing but the right to read, and keeps one file a run: the last checkpoint that it cosigned. Whoever holds such
a file can hold any copy of the log against it (`connito audit --checkpoint`). What it refused once it refuses for good: the
signed head that it keeps stays a proof, whatever is shown later.
"""

from __future__ import annotations

import asyncio
import fcntl
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from connito.bus.follow import CaughtUp
from connito.errors import Invalid, Retry, VerificationFailed
from connito.render import formats
from connito.runtime.host import Disk
from connito.runtime.progress import Notify
from connito.runtime.tasks import end_tasks
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

# A mirror that answers may be behind: what is not there after this long is held back.
PATIENCE, LOOK_SECONDS = 60.0, 0.2


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make a folder of a witness, and hold it. Raises `Retry` where another one does: each would write over what the other has
    seen, and two histories could be shown to the two; `Invalid` for a file.
    """
    if folder.exists() and not folder.is_dir():
        raise Invalid(f"{folder} is a file; give a folder in which this witness can remember what it cosigned")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Retry(f"another witness remembers in {folder}; give each a folder of its own") from error
        yield


@dataclass
class Witness:
    """Memory of a witness: `folder` holds `<run>.checkpoint`, and `<run>.refused` for a head that it would not cosign.

    Raises `Invalid` where a checkpoint there is damaged or of another platform. `run`: the only one to follow; empty: all.
    """

    folder: Path
    identity: Identity
    roster: Roster
    tell: Notify
    clock: Callable[[], int]
    run: str = ""
    disk: Disk = field(default_factory=Disk)

    def __post_init__(self) -> None:
        self.cosigned = 0
        self._remembered = {path.stem: self._read(path) for path in self._files("checkpoint")}
        # Runs of which a second history was shown, and what was seen of it: nothing more of them is cosigned.
        self.refused = {path.stem: _refused_before(path) for path in self._files("refused")}
        self._begin()

    def _begin(self) -> None:
        self._log, self._caught_up, self._unbegun = Log(self.roster, LogTrees()), False, Unbegun(Kept())
        # Runs whose remembered checkpoint was met again in the log that is read now.
        self._met: set[str] = set()
        # Of runs of which something is not there yet: what, and since when.
        self._lacking: dict[str, tuple[str, float]] = {}

    async def watch(self, items: AsyncGenerator[Record | CaughtUp, None], *, once: bool) -> None:
        """Take in a log from its start, until cancelled or, with `once`, up to what was stored then; `cosigned` counts heads.

        A run of which a second history was shown is told of and `refused` from then on; the others go on.
        """
        self._begin()
        reading = asyncio.ensure_future(self._read_all(items))
        try:
            while not reading.done() and not (once and self._caught_up and not self._lacking):
                await asyncio.wait({reading}, timeout=LOOK_SECONDS)
                self._lose_patience(PATIENCE)
            if reading.done():
                reading.result()
                self._lose_patience(0)
        finally:
            await end_tasks([reading])

    async def _read_all(self, items: AsyncGenerator[Record | CaughtUp, None]) -> None:
        async with aclosing(items):
            async for item in items:
                if isinstance(item, CaughtUp):
                    self._catch_up()
                    continue
                for record in self._unbegun.ready(item):
                    facts = self._take(record)
                    # Whether a run was released is known when all of it was read.
                    if facts is not None and self._caught_up:
                        self._attend(facts.run, partial(self._advance, facts))

    def _lack(self, run: str, what: str) -> None:
        if run not in self._lacking and run not in self.refused:
            self.tell(f"{run}: {what}; waiting for it")
            self._lacking[run] = what, time.monotonic()

    def _lose_patience(self, seconds: float) -> None:
        for run, (what, since) in list(self._lacking.items()):
            if time.monotonic() - since >= seconds:
                del self._lacking[run]
                self._attend(run, partial(self._miss, run, what))

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
            ends, none = "the log ends before the head that was cosigned", "the log does not hold it"
            self._lack(
                run, ends if run in self._log.runs else f"{none}; each platform's witness has a folder of its own"
            )

    def _miss(self, run: str, what: str) -> None:
        raise VerificationFailed(f"{run}: {what}; keep {self._path(run)}")

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
            except Retry as error:
                self._lack(facts.run, f"head {fact.key.cycle} stands for what is not shown: {error}")
                return
            except Invalid as error:
                self.disk.write(self.folder / f"{facts.run}.refused", fact.message.checkpoint.encode())
                raise VerificationFailed(
                    f"{facts.run}: {error}; not cosigned: two histories of this run were shown, keep {self.folder}"
                ) from error
        if facts.run in self._met:
            self._lacking.pop(facts.run, None)

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

    def _files(self, kind: str) -> list[Path]:
        only = f"{check_token(self.run, 'run id')}.{kind}" if self.run else f"*.{kind}"
        return sorted(self.folder.glob(only))

    def _read(self, path: Path) -> Checkpoint:
        """Return what a file of ours remembers; it is no bigger than a checkpoint can be."""
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        try:
            found = Checkpoint.parse(data.decode())
        except (Invalid, ValueError) as error:
            raise Invalid(f"{path} is damaged: {error}; put a copy of it there") from error
        if not any(map(found.is_signed_by, self.roster.ever("coordinator"))):
            raise Invalid(
                f"{path} is of another platform: no coordinator of this roster signed it; "
                "give each platform's witness a folder of its own"
            )
        return found


def _refused_before(path: Path) -> str:
    return f"{path.stem}: two histories of this run were shown before; {path} is the proof, and nothing more of it is cosigned"
