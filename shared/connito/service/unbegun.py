"""Keep on the disk what is said of runs that do not exist, whoever says it and however much: readers keep runs in memory.

A run begins with the message on the subject of its creation, which the coordinator alone may write; nobody has honestly said
anything of it before, and who reads streams side by side may read other streams first. Then what was laid aside comes back
in the order of each stream, and behind the creation where it was not in its stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from connito.wire.fact import Record
from connito.wire.kept import Kept
from connito.wire.subjects import INSTALLATION, LIBRARY, ROOT, run_of
from connito.wire.verification import by_participant


class Unbegun:
    """Messages of runs that have not begun, in the file of what is kept. `begun` are the runs that have."""

    def __init__(self, kept: Kept, begun: Iterable[str] = ()) -> None:
        self._begun, self._kept = set(begun) - {INSTALLATION, LIBRARY}, kept

    def ready(self, record: Record) -> Iterator[Record]:
        """Yield what can be read now that a message has come: nothing, or it with all that waited for it."""
        run = run_of(record.subject)
        if run in self._begun or (run in (INSTALLATION, LIBRARY) and not by_participant(record.subject)):
            yield record
        elif record.subject == f"{ROOT}.{run}.run.0.created":
            self._begun.add(run)
            behind = list(self._kept.take_up(run))
            yield from (laid for laid in behind if laid.stream == record.stream)
            yield record
            # Who reads these knows the run's rules.
            yield from (laid for laid in behind if laid.stream != record.stream)
        else:
            self._kept.lay(run, record)
