"""Keep on the disk what is said of runs that do not exist, whoever says it and however much: readers keep runs in memory.

A run begins with the message on the subject of its creation, which the coordinator alone may write; nobody has honestly said
anything of it before, and who reads streams side by side may read other streams first. Then what was laid aside comes back
in the order in which it was read, so that every reader has each stream in its order.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator

from connito.wire.fact import Record
from connito.wire.subjects import INSTALLATION, LIBRARY, ROOT, run_of
from connito.wire.verification import by_participant

_SCHEMA = """
create table aside (number integer primary key, run text, stream text, sequence integer, subject text, data blob,
                    time_unix_ms integer, headers text);
create index by_run on aside (run)
"""


class Unbegun:
    """Messages of runs that have not begun, in a file without a name."""

    def __init__(self) -> None:
        self._begun: set[str] = set()
        self._aside = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._aside.executescript(_SCHEMA)

    def ready(self, record: Record) -> Iterator[Record]:
        """Yield what can be read now that a message has come: nothing, or it with all that waited for it in front."""
        run = run_of(record.subject)
        if run in self._begun or (run in (INSTALLATION, LIBRARY) and not by_participant(record.subject)):
            yield record
        elif record.subject == f"{ROOT}.{run}.run.0.created":
            self._begun.add(run)
            yield from self._back(run)
            yield record
        else:
            self._lay(run, record)

    def _lay(self, run: str, record: Record) -> None:
        row = (run, record.stream, record.sequence, record.subject, record.data, record.time_unix_ms)
        self._aside.execute(
            "insert into aside (run, stream, sequence, subject, data, time_unix_ms, headers) values (?, ?, ?, ?, ?, ?, ?)",
            (*row, json.dumps(record.headers)),
        )

    def _back(self, run: str) -> Iterator[Record]:
        query = "select stream, sequence, subject, data, time_unix_ms, headers from aside where run = ? order by number"
        for stream, sequence, subject, data, time_unix_ms, headers in self._aside.execute(query, (run,)).fetchall():
            yield Record(stream, sequence, subject, data, time_unix_ms, json.loads(headers))
        self._aside.execute("delete from aside where run = ?", (run,))
