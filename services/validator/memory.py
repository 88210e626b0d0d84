"""Memory of what this validator has signed: a log that it is shown later has to go on from there.

What was read of the log is thrown away where another log answers. What was said must not be: a head that was cosigned, and a
secret that was revealed once and is known since.
"""

from __future__ import annotations

import json
from pathlib import Path

from connito.errors import Fatal, Invalid
from connito.runtime.host import Disk
from connito.v1 import cycle_pb2
from connito.wire.checkpoint import Checkpoint
from connito.wire.facts import RunFacts
from connito.wire.subjects import check_token


class Memory:
    """One small file for each run; without a folder, until the process ends."""

    def __init__(self, folder: Path | None, disk: Disk) -> None:
        self._folder, self._disk = folder, disk
        self._known: dict[str, dict[str, str]] = {}

    def cosign(self, facts: RunFacts, checkpoint: Checkpoint) -> None:
        """Remember the newest head. Raises `Invalid` unless the one before it is among the log's, or it is that one."""
        said = self._of(facts.run).get("head")
        if said is not None and said != checkpoint.note:
            heads = (facts.head(number) for number in range(facts.next_head - 1, 0, -1))
            if said not in (head.message.checkpoint for head in heads if head is not None):
                size = Checkpoint.parse(said).size
                raise Invalid(f"this validator cosigned a head over {size} messages that this log does not have")
        self._remember(facts.run, head=checkpoint.note)

    def reveal(self, facts: RunFacts, cycle: int) -> None:
        """Remember over which submissions a secret is revealed. Raises `Invalid` where it was over others, or later ones."""
        settled = facts.one(cycle_pb2.WindowSettled, "submit", cycle, "settled")
        now = f"{cycle} {'' if settled is None else settled.digest.hex()}"
        said = self._of(facts.run).get("revealed", "0 ")
        if int(said.split()[0]) >= cycle and said != now:
            raise Invalid(f"this validator revealed its secret of cycle {said.split()[0]} over other submissions")
        self._remember(facts.run, revealed=now)

    def _of(self, run: str) -> dict[str, str]:
        if run not in self._known:
            path = self._path(run)
            try:
                self._known[run] = {} if path is None or not path.exists() else json.loads(path.read_bytes())
            except ValueError as error:
                raise Fatal(f"{path} is damaged: put a copy of it there, or remove it") from error
        return self._known[run]

    def _remember(self, run: str, **said: str) -> None:
        before = self._of(run)
        if before | said != before:
            if (path := self._path(run)) is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._disk.write(path, json.dumps(before | said).encode())
            before.update(said)

    def _path(self, run: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{check_token(run, 'run id')}.json"
