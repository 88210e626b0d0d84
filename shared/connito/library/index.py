"""The library's index: a projection of its log into SQLite with full-text search. Delete it and build it again at will.

What is applied twice, or in another order, leaves the same index. Statements about an expert (deprecated, yanked,
restored) are ranked by their place in the log; of two deposits under one id the first stands.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from connito.errors import Invalid, NotFound, Retry, VerificationFailed
from connito.library.governance import Standing, governance
from connito.library.schema import Described, ExpertRecord, read_record
from connito.v1 import reasons_pb2, run_pb2
from connito.wire.fact import Fact

SCHEMA_VERSION = 2
KINDS = ("deposited", "deprecated", "yanked", "restored", "opted-out", "opted-in", "used")

_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE seen (origin TEXT NOT NULL, sequence INTEGER NOT NULL, PRIMARY KEY (origin, sequence)) WITHOUT ROWID;
CREATE TABLE experts (
  id INTEGER PRIMARY KEY, expert_id TEXT NOT NULL UNIQUE, origin TEXT NOT NULL, sequence INTEGER NOT NULL,
  deposited_at INTEGER NOT NULL, domain TEXT NOT NULL, base_digest TEXT NOT NULL, license TEXT NOT NULL,
  visibility TEXT NOT NULL, organisation TEXT NOT NULL, owner TEXT NOT NULL, saving REAL);
CREATE TABLE records (id INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE INDEX experts_domain ON experts (domain);
CREATE INDEX experts_sequence ON experts (sequence);
CREATE TABLE notices (
  expert_id TEXT PRIMARY KEY, origin TEXT NOT NULL, sequence INTEGER NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE sources (expert_id TEXT NOT NULL, source TEXT NOT NULL, PRIMARY KEY (source, expert_id)) WITHOUT ROWID;
CREATE INDEX sources_expert ON sources (expert_id);
CREATE TABLE opt_outs (
  source TEXT PRIMARY KEY, origin TEXT NOT NULL, sequence INTEGER NOT NULL, standing INTEGER NOT NULL, reason TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE uses (
  origin TEXT NOT NULL, sequence INTEGER NOT NULL, expert_id TEXT NOT NULL, verb TEXT NOT NULL, who TEXT NOT NULL,
  units INTEGER NOT NULL, at INTEGER NOT NULL, PRIMARY KEY (origin, sequence)) WITHOUT ROWID;
CREATE VIRTUAL TABLE words USING fts5 (expert_id, domain, text, tokenize = "unicode61 remove_diacritics 2");
"""


@dataclass(frozen=True)
class LibraryEvent:
    """One entry of a library's log. `subject` is an expert id, or the data source that is opted out or in.

    `body`: the record (deposited), `{"reason"}` (statements), `{"verb", "by", "units"}` (used). `origin` names the log.
    """

    sequence: int
    time_unix_ms: int
    kind: str
    subject: str
    body: Described = field(default_factory=dict)
    origin: str = "LIBRARY"


def deposit_event(fact: Fact[run_pb2.ExpertDeposited], record: bytes) -> LibraryEvent:
    """Return the event of a deposit on the `LIBRARY` stream and the record it points to. `VerificationFailed` for
    other bytes.
    """
    message = fact.message
    if hashlib.sha256(record).hexdigest() != message.record.digest:
        raise VerificationFailed(
            f"the record of {message.expert_id} is not the one that was deposited; fetch it again",
            reason=reasons_pb2.REASON_DIGEST_MISMATCH,
        )
    return LibraryEvent(
        fact.sequence,
        fact.time_unix_ms,
        "deposited",
        message.expert_id,
        read_record(record, message.expert_id),
        fact.stream,
    )


class Index:
    """Experts, what is said about them, and their use. One writer; any number of readers."""

    def __init__(self, path: Path | None = None) -> None:
        """Open the index at `path`, in memory for None. A damaged file, or one of another schema, is rebuilt."""
        self.path = path
        self._db = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            return self._connect()
        except sqlite3.OperationalError as error:
            raise Retry(f"the index {self.path} cannot be opened: {error}; is another command writing it?") from error
        except sqlite3.DatabaseError:  # not a database: build it again
            assert self.path is not None
            self.path.unlink()
            return self._connect()

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path or ":memory:", isolation_level=None)
        # A projection needs no durability of its own: what is lost is built again from the log.
        db.execute("PRAGMA journal_mode = WAL" if self.path else "PRAGMA journal_mode = MEMORY")
        db.execute("PRAGMA synchronous = OFF")
        if db.execute("PRAGMA user_version").fetchone()[0] != SCHEMA_VERSION:
            tables = db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'words_%'")
            for (name,) in tables.fetchall():
                db.execute(f'DROP TABLE IF EXISTS "{name}"')
            db.executescript(_SCHEMA)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return db

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def apply(self, events: Iterable[LibraryEvent]) -> int:
        """Add events, all or none; returns how many were new. Raises `Invalid` for one that cannot be read."""
        new = 0
        with self._transaction():
            for event in events:
                if self._db.execute(
                    "INSERT OR IGNORE INTO seen VALUES (?, ?)", (event.origin, event.sequence)
                ).rowcount:
                    self._apply(event)
                    new += 1
        return new

    def last_sequence(self, origin: str = "LIBRARY") -> int:
        """Return the highest sequence of a log that was applied, 0 for none: where to read on."""
        row = self._db.execute("SELECT max(sequence) FROM seen WHERE origin = ?", (origin,)).fetchone()
        return int(row[0] or 0)

    def count(self) -> int:
        """Return experts in the index, whatever their standing."""
        return int(self._db.execute("SELECT count(*) FROM experts").fetchone()[0])

    def record(self, expert_id: str) -> ExpertRecord:
        """Return the record of an expert. Raises `NotFound`."""
        row = self._db.execute(
            "SELECT r.record FROM experts e JOIN records r ON r.id = e.id WHERE e.expert_id = ?", (expert_id,)
        ).fetchone()
        if row is None:
            raise NotFound(f"there is no expert {expert_id!r} in this library; see `connito library search`")
        found: ExpertRecord = json.loads(row[0])
        return found

    def lookup(self, expert_id: str) -> ExpertRecord | None:
        """Return `record`, or None: what `governance.attribute` walks parents with."""
        try:
            return self.record(expert_id)
        except NotFound:
            return None

    def standing(self, expert_id: str) -> Standing:
        """Return the current status of an expert; a data source that opted out outweighs everything else."""
        out = self._db.execute(
            "SELECT s.source, o.reason FROM sources s JOIN opt_outs o ON o.source = s.source "
            "WHERE s.expert_id = ? AND o.standing = 1 ORDER BY s.source LIMIT 1",
            (expert_id,),
        ).fetchone()
        if out is not None:
            return Standing("opted-out", f"{out[0]}: {out[1]}")
        row = self._db.execute("SELECT status, reason FROM notices WHERE expert_id = ?", (expert_id,)).fetchone()
        return Standing() if row is None or row[0] == "restored" else Standing(row[0], row[1])

    def usage(self, expert_id: str) -> dict[str, int]:
        """Return units used by verb."""
        rows = self._db.execute("SELECT verb, sum(units) FROM uses WHERE expert_id = ? GROUP BY verb", (expert_id,))
        return {verb: int(units) for verb, units in rows}

    def select(self, sql: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return rows of a read-only query; `connito.library.hits` is made of these."""
        return self._db.execute(sql, parameters).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _apply(self, event: LibraryEvent) -> None:
        if event.kind == "deposited":
            self._deposit(event)
        elif event.kind in ("deprecated", "yanked", "restored"):
            self._newest("notices", "expert_id", event, event.kind)
        elif event.kind in ("opted-out", "opted-in"):
            self._newest("opt_outs", "source", event, event.kind == "opted-out")
        elif event.kind == "used":
            body = event.body
            use = (body.get("verb", ""), body.get("by", ""), int(body.get("units", 1)), event.time_unix_ms)
            self._db.execute(
                "INSERT INTO uses VALUES (?, ?, ?, ?, ?, ?, ?)", (event.origin, event.sequence, event.subject, *use)
            )
        else:
            raise Invalid(
                f"the library's log has an entry of kind {event.kind!r}; this version knows {', '.join(KINDS)}"
            )

    def _newest(self, table: str, key: str, event: LibraryEvent, value: object) -> None:
        """Keep one statement per subject: the last one in the log."""
        self._db.execute(
            f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?) ON CONFLICT ({key}) DO UPDATE SET "  # noqa: S608
            f"origin = excluded.origin, sequence = excluded.sequence, reason = excluded.reason, "
            f"{'status = excluded.status' if table == 'notices' else 'standing = excluded.standing'} "
            f"WHERE (excluded.sequence, excluded.origin) > ({table}.sequence, {table}.origin)",
            (event.subject, event.origin, event.sequence, value, str(event.body.get("reason", ""))),
        )

    def _deposit(self, event: LibraryEvent) -> None:
        known = self._db.execute(
            "SELECT id, sequence, origin FROM experts WHERE expert_id = ?", (event.subject,)
        ).fetchone()
        if known is not None:
            if (known[1], known[2]) <= (event.sequence, event.origin):
                return
            self._db.execute("DELETE FROM experts WHERE id = ?", known[:1])
            self._db.execute("DELETE FROM records WHERE id = ?", known[:1])
            self._db.execute("DELETE FROM words WHERE rowid = ?", known[:1])
            self._db.execute("DELETE FROM sources WHERE expert_id = ?", (event.subject,))
        record, rules = event.body, governance(event.body)
        row = self._db.execute(
            "INSERT INTO experts VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                event.subject,
                event.origin,
                event.sequence,
                event.time_unix_ms,
                str(record.get("domain", "")),
                str(record.get("base", {}).get("manifest", "")),
                str(record.get("license", "")),
                rules["visibility"],
                rules["organisation"],
                rules["owner"],
                saving(record),
            ),
        ).lastrowid
        text = json.dumps(dict(record), sort_keys=True, separators=(",", ":"))
        self._db.execute("INSERT INTO records VALUES (?, ?)", (row, text))
        self._db.execute("INSERT INTO words (rowid, expert_id, domain, text) VALUES (?, ?, ?, ?)",
                         (row, event.subject, str(record.get("domain", "")), searchable(record)))  # fmt: skip
        self._db.executemany(
            "INSERT OR IGNORE INTO sources VALUES (?, ?)", [(event.subject, source) for source in rules["sources"]]
        )


def saving(record: Described) -> float | None:
    """Return held-out nats per token that the expert saved on its own domain; None where nothing was measured."""
    for row in record.get("losses", []):
        if row.get("domain") == record.get("domain") and row.get("before") is not None and row.get("after") is not None:
            return float(row["before"]) - float(row["after"])
    return None


def searchable(record: Described) -> str:
    """Return the words by which an expert is found: what people wrote about it, not its digests."""
    selection, derived = record.get("selection", {}), record.get("derived", {})
    parts = [
        record.get("data_statement", ""),
        record.get("base", {}).get("name", ""),
        record.get("license", ""),
        record.get("customer", ""),
        record.get("run", ""),
        selection.get("method", ""),
        derived.get("verb", ""),
        *record.get("tags", []),
        *(str(row.get("domain", "")) for row in record.get("losses", [])),
        *(str(row.get("label", "")) for row in record.get("contributors", [])),
    ]
    return " ".join(str(part) for part in parts if part)
