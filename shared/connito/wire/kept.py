"""Facts on this machine's disk: what memory let go of, and what a process that starts need not read and verify again.

One SQLite file for each service. Every applied fact is a row with a tag under a key that only this service has; the rows, what
else follows from the log (`notes`), and how far each stream was read change in one transaction. A file that is damaged, of
another key, roster or version, or behind which lies another log is thrown away, and everything is read from the start. What
belongs to one cycle is looked through when it is first asked for, so that opening does not grow with the age of a run
(docs/adr/0027-snapshots-of-the-log.md).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError, Message

from connito.errors import Fatal
from connito.wire.fact import Fact, Record
from connito.wire.subjects import FactKey
from connito.wire.verification import CATALOGUE, INGRESS

FORMAT = 5
# Facts that were read back and stay in memory.
REMEMBERED = 20_000

_SCHEMA = """
create table meta (binding blob);
create table facts (run text, section text, cycle integer, kind text, id text, signer text, stream text, sequence integer,
                    time_unix_ms integer, digest blob, payload blob, tag blob,
                    primary key (run, cycle, section, kind, id)) without rowid;
create table notes (run text primary key, note blob, tag blob) without rowid;
create table read (stream text primary key, sequence integer, anchor blob, tag blob);
create table aside (number integer primary key, run text, stream text, sequence integer, subject text, data blob,
                    time_unix_ms integer, headers text, tag blob);
create index aside_by_run on aside (run);
create table cycles (run text, cycle integer, facts integer, tag blob, primary key (run, cycle)) without rowid;
create table tally (cycles integer, notes integer, aside integer, tag blob);
insert into tally values (0, 0, 0, null);
create trigger facts_out after delete on facts
  begin update cycles set facts = facts - number(old.tag) where run = old.run and cycle = old.cycle; end;
"""
# Damage can leave each row whole and take others with it, or bring old ones back: sums of tags are kept with every change, of
# facts by run and cycle, and of all cycles, notes, and what was laid aside.
_SUMMED = """
create trigger {0}_in after insert on {0} begin update tally set {0} = {0} + number(new.tag); end;
create trigger {0}_out after delete on {0} begin update tally set {0} = {0} - number(old.tag); end;
"""
_SUMS = "select cycles, notes, aside, tag from tally"
_SUMS_OF_ROWS = """select (select sum(number(tag)) from cycles), (select sum(number(tag)) from notes),
                          (select sum(number(tag)) from aside)"""
_CYCLE, _SUM_OF_CYCLE = (
    f"select {what} where run = ? and cycle = ?" for what in ("facts, tag from cycles", "sum(number(tag)) from facts")
)
_STANDING = "select section, cycle, kind, id, signer, stream, sequence, time_unix_ms, digest, payload, tag from facts"
_OF_A_KIND = f"{_STANDING} where run = ? and section = ? and cycle = ? and kind = ? order by id"
_OF_A_CYCLE = f"{_STANDING} where run = ? and cycle = ?"
_AT_HAND = "select cycle from cycles where run = ? and (cycle = 0 or cycle between ? and ? or cycle >= ?)"
_SPANS = "select run, min(sequence), max(sequence) from facts where stream = ? group by run order by 3 desc"
_LAID = "select run, stream, sequence, subject, data, time_unix_ms, headers, tag from aside"
# What SQLite says of a damaged file; its words may themselves hold bytes of it.
_DAMAGE = (sqlite3.DatabaseError, UnicodeDecodeError)


def anchor_of(record: Record) -> bytes:
    """Return what tells a stored message from any other at its place."""
    fields = (record.stream, str(record.sequence), str(record.time_unix_ms), record.subject)
    return hashlib.sha256("\n".join(fields).encode() + b"\n" + record.data).digest()


class Kept:
    """The file of one service; without a `path`, a nameless one that ends with the process."""

    def __init__(self, path: Path | None = None, binding: bytes = b"", secret: bytes = b"") -> None:
        self.path, self._binding, self._secret = path, hashlib.sha256(binding + bytes([FORMAT])).digest(), secret[:32]
        # Why nothing more is written. What was committed stays readable, and the rest is in memory.
        self.closed_for_writing = ""
        # Why there is no file although there should be one.
        self.fileless = ""
        self._uncommitted: list[Fact] = []
        self._beside: dict[tuple[str, str, int, str], dict[str, Fact]] = {}
        # What was laid aside since the last commit, and in the end everything that was.
        self._laid: list[tuple[str, Record]] = []
        self._lock = threading.RLock()
        self._back: OrderedDict[tuple[str, str, int, str], dict[str, Fact]] = OrderedDict()
        self._held = 0
        # What was added to the sums of cycles since the last commit, and of which cycles they were found to hold.
        self._added: dict[tuple[str, int], int] = {}
        self._sound: set[tuple[str, int]] = set()
        self.database = self._open()

    # Opening.

    def _open(self) -> sqlite3.Connection:
        if self.path is None:
            return _fresh("")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = _connect(str(self.path))
            # Another process with this file has its own view of the log.
            found.execute("pragma locking_mode = exclusive")
            found.execute("pragma journal_mode = wal")
            found.execute("begin immediate")
            found.execute("commit")
        except (OSError, sqlite3.OperationalError) as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
                return self._anew()  # of a format that nobody here writes
            self.fileless = str(error)
            return _fresh("")
        except _DAMAGE:
            return self._anew()
        try:
            if found.execute("select binding from meta").fetchall() == [(self._binding,)] and self._whole(found):
                found.execute("pragma synchronous = normal")
                return found
        except _DAMAGE:
            pass
        found.close()
        return self._anew()

    def _whole(self, found: sqlite3.Connection) -> bool:
        """Return whether the sums, of which each stands for the rows of a cycle, are those of the last commit."""
        ((*sums, tag),), (rows,) = found.execute(_SUMS).fetchall(), found.execute(_SUMS_OF_ROWS).fetchall()
        same = sums == [row or 0 for row in rows]
        return same and isinstance(tag, bytes) and hmac.compare_digest(tag, self._tag(*sums))

    def _anew(self) -> sqlite3.Connection:
        assert self.path is not None
        self._remove()
        try:
            made = _fresh(str(self.path))
            made.execute("insert into meta values (?)", (self._binding,))
            made.execute("update tally set tag = ?", (self._tag(0, 0, 0),))
        except sqlite3.DatabaseError as error:
            self.fileless = str(error)
            return _fresh("")
        return made

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm") if self.path is not None else ():
            with suppress(OSError):
                assert self.path is not None
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def forget(self) -> None:
        """Throw everything away: it is of another log than the one that is there."""
        self.database.close()
        self._back.clear()
        self._held = 0
        self._added.clear()
        self._sound.clear()
        self.database = _fresh("") if self.path is None else self._anew()

    def close(self) -> None:
        """Let go of the file as it was when `commit` was called last."""
        self.database.close()

    # Writing.

    def put(self, fact: Fact) -> None:
        """Write down a fact, in place of what was written under its key."""
        key, place = fact.key, (fact.run, fact.key.section, fact.key.cycle, fact.key.kind)
        with self._lock:
            # What is read back stays at hand while others of its kind come: a stream that is behind adds one by one.
            back = self._back.get(place)
            if back is not None and back.get(key.id) is fact:
                return
            if back is not None:
                self._back[place] = dict(sorted({**back, key.id: fact}.items()))
                self._held += len(self._back[place]) - len(back)
        row = (fact.run, key.section, key.cycle, key.kind, key.id, fact.signer, fact.stream, fact.sequence)
        rest = (fact.time_unix_ms, fact.digest, fact.message.SerializeToString())
        tag, cycle = self._tag(*row, *rest), (fact.run, key.cycle)
        if not self.closed_for_writing:
            # Signed anew with what is added, a sum would hide what was gone before.
            self._look_through(*cycle)
            if cycle not in self._added:
                self._write("insert or ignore into cycles values (?, ?, 0, null)", cycle)
            self._added[cycle] = self._added.get(cycle, 0) + _number(tag)
        self._write("insert or replace into facts values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*row, *rest, tag))
        if self.closed_for_writing:
            self._beside.setdefault(place, {})[key.id] = fact
        else:
            self._uncommitted.append(fact)

    def note(self, run: str, note: bytes) -> None:
        """Write down what else follows from the log of a run."""
        self._write("insert or replace into notes values (?, ?, ?)", (run, note, self._tag(run, note)))

    def lay(self, run: str, record: Record) -> None:
        """Write down a message that nobody reads yet."""
        place = (run, record.stream, record.sequence, record.subject)
        row = (*place, record.data, record.time_unix_ms, json.dumps(record.headers))
        self._write(
            "insert into aside (run, stream, sequence, subject, data, time_unix_ms, headers, tag)"
            " values (?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, self._tag(*row)),
        )
        self._laid.append((run, record))

    def take_up(self, run: str) -> Iterator[Record]:
        """Yield what was laid aside for a run, in its order, and keep it no longer."""
        if self.closed_for_writing:
            yield from (record for where, record in self._laid if where == run)
            self._laid = [entry for entry in self._laid if entry[0] != run]
            return
        for _, record in self._aside(f"{_LAID} where run = ? order by number", (run,)):
            yield record
        self._write("delete from aside where run = ?", (run,))
        self._laid = [entry for entry in self._laid if entry[0] != run]

    def _aside(self, query: str, values: tuple[object, ...] = ()) -> Iterator[tuple[str, Record]]:
        for *row, tag in self._read(query, values):
            self._check(tag, *row)
            run, stream, sequence, subject, data, time_unix_ms, headers = row
            yield run, Record(stream, sequence, subject, data, time_unix_ms, json.loads(headers))

    def commit(self, positions: Mapping[str, Record]) -> bool:
        """Make everything so far what a later process begins with, which goes on behind these records.

        Return whether the disk took it.
        """
        for stream, record in positions.items():
            row = (stream, record.sequence, anchor_of(record))
            self._write("insert or replace into read values (?, ?, ?, ?)", (*row, self._tag(*row)))
        if not self.closed_for_writing and self.database.in_transaction:
            try:
                self._sum_up()
                self.database.execute("commit")
            except _DAMAGE as error:
                self._give_up(error)
        if not self.closed_for_writing:
            self._uncommitted.clear()
            self._laid.clear()
        return not self.closed_for_writing

    def _sum_up(self) -> None:
        """Sign the sums of what has changed, and of them all."""
        changed = 0
        for cycle, added in self._added.items():
            ((total, before),) = self.database.execute(_CYCLE, cycle).fetchall()
            row = (total + added, self._tag(*cycle, total + added))
            self.database.execute("update cycles set facts = ?, tag = ? where run = ? and cycle = ?", (*row, *cycle))
            changed += _number(row[1]) - (0 if before is None else _number(before))
        self._added.clear()
        self.database.execute("update tally set cycles = cycles + ?", (changed,))
        ((*sums, _),) = self.database.execute(_SUMS).fetchall()
        self.database.execute("update tally set tag = ?", (self._tag(*sums),))

    def _write(self, statement: str, row: tuple[object, ...]) -> None:
        if self.closed_for_writing:
            return
        try:
            if not self.database.in_transaction:
                self.database.execute("begin")
            self.database.execute(statement, row)
        except _DAMAGE as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.closed_for_writing = str(error)
        with suppress(sqlite3.Error):
            # A disk that was full has rolled back already.
            self.database.execute("rollback")
        self._added.clear()
        if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            # The next process would fail at it too. What this one has read of it, it goes on with.
            self._remove()
        self._laid = [*self._aside(f"{_LAID} order by number"), *self._laid]
        with self._lock:
            self._back.clear()
            self._held = 0
            for fact in self._uncommitted:
                place = (fact.run, fact.key.section, fact.key.cycle, fact.key.kind)
                self._beside.setdefault(place, {})[fact.key.id] = fact

    # Reading.

    def positions(self) -> dict[str, tuple[int, bytes]]:
        """Return the last message that was read of each stream, and its anchor. Raises `Fatal` as `all`."""
        found = {}
        for *row, tag in self._read("select stream, sequence, anchor, tag from read", ()):
            self._check(tag, *row)
            stream, sequence, anchor = row
            found[stream] = (sequence, anchor)
        return found

    def spans(self, stream: str) -> list[tuple[str, int, int]]:
        """Return runs with the sequences of their first and last facts in a stream, the newest first."""
        return [(str(run), int(first), int(last)) for run, first, last in self._read(_SPANS, (stream,))]

    def notes(self) -> Iterator[tuple[str, bytes]]:
        """Yield what was noted of each run. Raises `Fatal` as `all`."""
        for run, note, tag in self._read("select run, note, tag from notes", ()):
            self._check(tag, run, note)
            yield run, note

    def all(self, run: str, section: str, cycle: int, kind: str) -> Mapping[str, Fact]:
        """Return facts of a kind by id, in the order of ids. Raises `Fatal`, and removes the file, when it is damaged."""
        place = (run, section, cycle, kind)
        with self._lock:
            if place in self._back:
                self._back.move_to_end(place)
                return self._back[place]
            self._look_through(run, cycle)
            found = {fact.key.id: fact for fact in self._facts(run, _OF_A_KIND, place)}
            if place in self._beside:
                found = dict(sorted({**found, **self._beside[place]}.items()))
            self._back[place] = found
            self._held += len(found)
            while self._held > REMEMBERED and len(self._back) > 1:
                self._held -= len(self._back.popitem(last=False)[1])
            return found

    def since(self, run: str, cycle: int, last: int = 1 << 62, number: int = 1 << 62) -> Iterator[Fact]:
        """Yield what belongs to no cycle, everything from one to the `last`, and receipts from a number on; `Fatal` as `all`."""
        for (one,) in self._read(_AT_HAND, (run, cycle, last, number)):
            self._look_through(run, one)
            yield from self._facts(run, _OF_A_CYCLE, (run, one))

    def _look_through(self, run: str, cycle: int) -> None:
        """Check once that the rows of a cycle are those that were committed. Raises `Fatal` as `all`."""
        if (run, cycle) in self._sound:
            return
        signed, ((total,),) = self._read(_CYCLE, (run, cycle)), self._read(_SUM_OF_CYCLE, (run, cycle))
        for wanted, tag in signed:
            self._check(tag, run, cycle, wanted)
        if [wanted for wanted, _ in signed] != ([] if total is None else [total]):
            raise self._damaged()
        self._sound.add((run, cycle))

    def _facts(self, run: str, query: str, values: tuple[object, ...]) -> Iterator[Fact]:
        for *row, payload, tag in self._read(query, values):
            self._check(tag, run, *row, payload)
            section, cycle, kind, id_, signer, stream, sequence, time_unix_ms, digest = row
            key, signed = FactKey(section, cycle, kind, id_), bytes(digest)
            try:
                message = _type_of(stream, kind, section).FromString(payload)
            except (KeyError, DecodeError) as error:
                raise self._damaged() from error
            yield Fact(run, key, message, signer, stream, sequence, time_unix_ms, signed)

    def _read(self, query: str, values: tuple[object, ...]) -> list[tuple[Any, ...]]:
        try:
            return self.database.execute(query, values).fetchall()
        except _DAMAGE as error:
            raise self._damaged() from error

    def _tag(self, *fields: object) -> bytes:
        tag = hashlib.blake2b(key=self._secret, digest_size=16)
        for field in fields:
            data = field if isinstance(field, bytes) else str(field).encode()
            tag.update(len(data).to_bytes(4, "big") + data)
        return tag.digest()

    def _check(self, tag: object, *fields: object) -> None:
        if not isinstance(tag, bytes) or not hmac.compare_digest(tag, self._tag(*fields)):
            raise self._damaged()

    def _damaged(self) -> Fatal:
        self.closed_for_writing = "it is damaged"
        self._remove()
        return Fatal(
            f"what this service kept of the log in {self.path} is damaged; started again, it reads the log anew"
        )


def _type_of(stream: str, kind: str, section: str) -> type[Message]:
    """Return the type of a fact's message: what verification asked for when it was read."""
    return INGRESS[kind] if stream == "INGRESS" else CATALOGUE[section, kind][0]


def _number(tag: object) -> int:
    """Return a tag as a number of which any count of rows can be summed, and never 0."""
    return 1 + int.from_bytes(tag[:4], "big") if isinstance(tag, bytes) else 1


def _connect(name: str) -> sqlite3.Connection:
    made = sqlite3.connect(name, isolation_level=None, check_same_thread=False, timeout=0)
    # Without, a row that is replaced is not counted as taken away.
    made.execute("pragma recursive_triggers = on")
    made.create_function("number", 1, _number, deterministic=True)
    return made


def _fresh(name: str) -> sqlite3.Connection:
    made = _connect(name)
    if name:
        made.execute("pragma locking_mode = exclusive")
        made.execute("pragma journal_mode = wal")
        made.execute("pragma synchronous = normal")
    made.executescript(_SCHEMA + "".join(map(_SUMMED.format, ("notes", "aside"))))
    return made
