"""What is kept on the disk: as it was committed, or thrown away."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from connito.errors import Fatal
from connito.v1 import cycle_pb2, run_pb2
from connito.wire import kept as kept_module
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.kept import Kept, anchor_of
from connito.wire.log import Log
from connito.wire.roster import Roster
from connito.wire.subjects import FactKey

SECRET = bytes(range(32))


def opened(cycle: int, sequence: int = 1) -> Fact:
    message = cycle_pb2.WindowOpened(run="r", cycle=cycle, expected=["a", "b"])
    return Fact("r", FactKey("train", cycle, "opened"), message, "U", "TRAIN", sequence, 5, bytes(32))


def trained(cycle: int, miner: str, sequence: int = 1) -> Fact:
    message = cycle_pb2.TrainingFinished(run="r", cycle=cycle)
    return Fact("r", FactKey("ingress", cycle, "trained", miner), message, miner, "INGRESS", sequence, 5, bytes(32))


def record(sequence: int) -> Record:
    return Record("TRAIN", sequence, "connito.v1.r.train.1.opened", b"data", 7, {"a": "b"})


def path_in(folder: Path) -> Path:
    return folder / "state" / "log.sqlite"


def at(folder: Path, binding: bytes = b"here", secret: bytes = SECRET) -> Kept:
    return Kept(path_in(folder), binding, secret)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    kept = at(tmp_path)
    for cycle in range(1, 5):
        kept.put(opened(cycle))
        kept.put(trained(cycle, "b"))
        kept.put(trained(cycle, "a"))
    kept.note("r", b"a note")
    kept.lay("ghost", record(4))
    assert kept.commit({"TRAIN": record(9)})
    kept.close()
    return tmp_path


def test_what_was_committed_is_there_again(filled: Path) -> None:
    kept = at(filled)
    assert kept.positions() == {"TRAIN": (9, anchor_of(record(9)))}
    assert list(kept.notes()) == [("r", b"a note")]
    assert kept.all("r", "ingress", 2, "trained") == {"a": trained(2, "a"), "b": trained(2, "b")}
    assert list(kept.all("r", "ingress", 2, "trained")) == ["a", "b"]
    assert {fact.key.cycle for fact in kept.since("r", 3)} == {3, 4}
    assert list(kept.take_up("ghost")) == [record(4)]
    assert list(kept.take_up("ghost")) == []
    assert oct(path_in(filled).parent.stat().st_mode)[-2:] == "00"
    kept.close()


def test_what_was_not_committed_is_not(filled: Path) -> None:
    kept = at(filled)
    kept.put(opened(5))
    kept.note("r", b"another")
    assert list(kept.all("r", "train", 5, "opened").values()) == [opened(5)]
    kept.close()
    kept = at(filled)
    assert not kept.all("r", "train", 5, "opened")
    assert list(kept.notes()) == [("r", b"a note")]
    kept.close()


@pytest.mark.parametrize("binding", [b"", b"another roster"])
def test_a_file_that_is_bound_to_something_else_is_thrown_away(filled: Path, binding: bytes) -> None:
    kept = at(filled, binding)
    assert not kept.positions()
    assert not list(kept.notes())
    kept.close()
    assert not at(filled).positions(), "and the other one has its own now"


def test_rows_of_another_key_are_not_believed(filled: Path) -> None:
    kept = at(filled, secret=bytes(32))
    assert (kept.all("r", "train", 1, "opened"), kept.positions()) == ({}, {})
    kept.close()
    assert not at(filled).positions(), "it was removed"


@pytest.mark.parametrize("column", ["payload", "signer", "sequence", "digest", "time_unix_ms"])
def test_a_changed_row_is_seen_and_the_file_thrown_away(filled: Path, column: str) -> None:
    with closing(sqlite3.connect(path_in(filled))) as other, other:
        other.execute(f"update facts set {column} = substr(hex({column}), 1, 4) where cycle = 2")
    kept = at(filled)
    assert kept.all("r", "train", 1, "opened")
    with pytest.raises(Fatal, match="damaged"):
        kept.all("r", "ingress", 2, "trained")
    kept.close()
    again = at(filled)
    assert not again.positions()
    assert again.commit({"TRAIN": record(1)}), "a new one can be made"
    again.close()


@pytest.mark.parametrize("content", [b"", b"not a database" * 100, b"SQLite format 3\x00" + bytes(500)])
def test_a_file_that_is_no_database_is_thrown_away(filled: Path, content: bytes) -> None:
    for path in path_in(filled).parent.iterdir():
        path.unlink()
    path_in(filled).write_bytes(content)
    kept = at(filled)
    assert not kept.positions()
    kept.put(opened(1))
    assert kept.commit({"TRAIN": record(3)})
    kept.close()
    kept = at(filled)
    assert kept.positions()
    kept.close()


@pytest.mark.parametrize("flip", range(0, 4096, 311))
def test_no_flipped_byte_becomes_a_fact(filled: Path, flip: int) -> None:
    """Either the facts are as they were, or the file is not believed."""
    data = bytearray(path_in(filled).read_bytes())
    data[-1 - flip] ^= 0x41
    path_in(filled).write_bytes(data)
    wanted = {opened(cycle).key: opened(cycle) for cycle in range(1, 5)}
    kept = at(filled)
    try:
        for fact in (fact for cycle in range(1, 5) for fact in kept.all("r", "train", cycle, "opened").values()):
            assert fact == wanted[fact.key]
    except Fatal:
        pass
    finally:
        kept.close()


def test_a_second_process_with_the_same_folder_goes_without(filled: Path) -> None:
    first, second = at(filled), at(filled)
    assert first.positions()
    assert not second.positions()
    second.put(opened(9))
    assert second.commit({"TRAIN": record(1)})
    second.close()
    assert not first.all("r", "train", 9, "opened")
    first.close()


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file in place of the folder")
    kept = at(tmp_path)
    kept.put(opened(1))
    assert kept.commit({"TRAIN": record(1)})
    assert kept.all("r", "train", 1, "opened")
    kept.close()


def test_a_full_disk_costs_nothing_but_the_next_start(tmp_path: Path) -> None:
    kept = at(tmp_path)
    facts = RunFacts("r", shelf=kept)
    facts.add(opened(1))
    kept.put(opened(1))
    assert kept.commit({"TRAIN": record(1)})
    facts.let_go(1)
    pages = kept.database.execute("pragma page_count").fetchone()[0]
    kept.database.execute(f"pragma max_page_count = {pages}")
    for number in range(500):
        late = trained(1, f"m{number:03}", number + 1)
        assert facts.add(late), "it belongs to a cycle that is on the disk"
        kept.lay("ghost", record(number))
    assert kept.closed_for_writing
    assert not kept.commit({"TRAIN": record(2)})
    assert facts.window("train", 1).opened == opened(1).message
    assert list(facts.trained(1)) == [f"m{number:03}" for number in range(500)]
    assert [one.sequence for one in kept.take_up("ghost")] == list(range(500))
    kept.close()
    again = at(tmp_path)
    assert again.positions()["TRAIN"][0] == 1, "the next process begins where the disk was full"
    again.close()


def test_cycles_that_were_let_go_are_read_as_before() -> None:
    kept, plain = Kept(), RunFacts("r")
    facts = RunFacts("r", shelf=kept)
    created = Fact(
        "r", FactKey("run", 0, "created"), run_pb2.RunCreated(spec=run_pb2.RunSpec(run="r")), "U", "RUNS", 1, 5
    )
    told = [created, *(opened(cycle) for cycle in range(1, 9)), *(trained(cycle, "a", 5) for cycle in range(1, 9))]
    for fact in told:
        plain.add(fact)
        facts.add(fact)
        kept.put(fact)
        facts.let_go(facts.cycle - 3)
    assert len(facts.facts) < len(plain.facts)
    earlier = trained(2, "a", 3)
    for one in (facts, plain):
        assert not one.add(trained(2, "a", 9)), "the first message on a subject stands, wherever it is"
        assert one.add(earlier)
        assert one.add(trained(2, "b", 7))
    for key in plain.facts:
        assert facts.fact(key.section, key.cycle, key.kind, key.id) == plain.facts[key]
    assert [dict(facts.trained(cycle)) for cycle in range(10)] == [dict(plain.trained(cycle)) for cycle in range(10)]
    facts.let_go(0, whole=True)
    assert not facts.facts
    assert facts.spec == plain.spec


def received(number: int) -> Fact:
    message = run_pb2.IngressHead(run="r", cycle=number, last_sequence=number)
    return Fact("r", FactKey("run", number, "received"), message, "C", "RUNS", number + 100, 5)


def test_receipts_are_no_cycles_and_few_stay_in_memory(tmp_path: Path) -> None:
    """There may be one a second: of a long run a hundred times as many as cycles, and every service reads them."""
    kept = at(tmp_path)
    log = Log(Roster({}))
    log.kept = kept
    facts = log.runs["r"] = RunFacts("r", shelf=kept)
    told = [*(opened(cycle) for cycle in range(1, 6)), *(received(number) for number in range(1, 301)), opened(7)]
    for number, fact in enumerate(told):
        assert facts.add(fact)
        kept.put(fact)
        if number % 50 == 0:
            log.let_go("r")
    note = log.note("r")
    log.let_go("r")
    in_memory = {key for key in facts.facts if key.kind == "received"}
    assert len(in_memory) <= 8
    kept.note("r", json.dumps(note).encode())
    assert kept.commit({"TRAIN": record(1)})
    kept.close()
    again = Log(Roster({}))
    again.restore(found := at(tmp_path))
    facts = again.runs["r"]
    assert len([key for key in facts.facts if key.kind == "received"]) <= 60, "those since it was last let go"
    assert facts.newest_receipt == received(300).message
    assert [facts.received(number) for number in range(1, 301)] == [received(number) for number in range(1, 301)]
    assert facts.window("train", 7).opened == opened(7).message, "streams are read side by side"
    assert not facts.add(received(17))
    found.close()


def damage(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(path_in(folder))) as other, other:
        other.create_function("number", 1, lambda tag: 1 + int.from_bytes(tag[:4], "big"))
        other.execute(statement)


@pytest.mark.parametrize("column", ["stream", "sequence", "anchor", "tag"])
@pytest.mark.parametrize("value", ["null", "'x'", "7"])
def test_a_changed_position_is_seen_and_the_next_start_reads_anew(filled: Path, column: str, value: str) -> None:
    damage(filled, "create table copy as select * from read; ")
    damage(filled, f"update copy set {column} = {value}")
    damage(filled, "drop table read")
    damage(filled, "alter table copy rename to read")
    kept = at(filled)
    with pytest.raises(Fatal, match="damaged"):
        kept.positions()
    kept.close()
    assert not at(filled).positions()


@pytest.mark.parametrize("column", ["stream", "sequence", "subject", "data", "time_unix_ms", "headers"])
def test_a_changed_message_that_was_laid_aside_is_not_taken_for_its_senders(filled: Path, column: str) -> None:
    damage(filled, f"update aside set {column} = 'other'")
    kept = at(filled)
    with pytest.raises(Fatal, match="damaged"):
        list(kept.take_up("ghost"))
    kept.close()
    assert not at(filled).positions()


def test_a_damaged_page_anywhere_is_thrown_away_at_the_latest_a_start_later(filled: Path, tmp_path: Path) -> None:
    whole = path_in(filled).read_bytes()
    for page in range(len(whole) // 4096):
        for content in (bytes(4096), b"\xcc" * 4096):
            path_in(filled).write_bytes(whole[: page * 4096] + content + whole[(page + 1) * 4096 :])
            for last in (False, True):
                kept = at(filled)
                try:
                    kept.positions(), list(kept.notes()), list(kept.since("r", 0)), list(kept.take_up("ghost"))
                    kept.put(opened(9))
                    assert kept.commit({}) or not last
                except Fatal:
                    assert not last, "the first has removed it"
                kept.close()
            path_in(filled).unlink(missing_ok=True)


def test_who_finds_no_place_for_a_file_says_why(filled: Path) -> None:
    first, second = at(filled), at(filled)
    assert (first.fileless, second.fileless) == ("", "database is locked")
    second.close()
    first.close()
    damage(filled, "vacuum")
    with path_in(filled).open("r+b") as file:
        file.seek(44)
        file.write(bytes([0, 0, 0, 9]))
    third = at(filled)
    assert (third.fileless, third.positions()) == ("", {}), "a format that nobody here writes"
    third.close()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file of many pages, each with rows of its own."""
    kept = at(tmp_path)
    for cycle in range(1, 200):
        kept.put(opened(cycle))
    assert kept.commit({"TRAIN": record(1)})
    old = path_in(tmp_path).with_suffix(".old")
    kept.close()
    old.write_bytes(path_in(tmp_path).read_bytes())
    kept = at(tmp_path)
    for cycle in range(200, 400):
        kept.put(opened(cycle))
        kept.put(opened(cycle, 2))
    assert kept.commit({"TRAIN": record(9)})
    kept.close()
    return tmp_path


def what_is_kept(folder: Path) -> tuple[set[int], bool]:
    """The cycles that a service finds, and whether it believes to be where it was."""
    kept = at(folder)
    try:
        return {fact.key.cycle for fact in kept.since("r", 0)}, bool(kept.positions())
    except Fatal:
        return set(), False
    finally:
        kept.close()


def test_no_page_in_another_s_place_loses_rows_unseen(large: Path) -> None:
    """Damage that leaves every row whole and every page a page: one is there twice, or as it was before."""
    whole, before = path_in(large).read_bytes(), path_in(large).with_suffix(".old").read_bytes()
    assert what_is_kept(large) == (set(range(1, 400)), True)
    pages = len(whole) // 4096
    assert pages > 12
    for page in range(1, pages):
        for content in (
            whole[(page % (pages - 1) + 1) * 4096 :][:4096],
            before[page * 4096 :][:4096],
            whole[4096:][:4096],
        ):
            if len(content) < 4096 or content == whole[page * 4096 :][:4096]:
                continue
            path_in(large).write_bytes(whole[: page * 4096] + content + whole[(page + 1) * 4096 :])
            cycles, there = what_is_kept(large)
            assert cycles == set(range(1, 400)) or not there, page


@pytest.mark.parametrize("table", ["facts", "notes", "aside"])
def test_a_row_that_is_gone_is_missed(table: str, filled: Path) -> None:
    damage(
        filled,
        f"delete from {table} where rowid in (select rowid from {table} limit 1)"
        if table == "aside"
        else f"delete from {table} where run = 'r'" + (" and cycle = 2 and id = 'a'" if table == "facts" else ""),
    )
    assert what_is_kept(filled) == (set(), False)


def test_a_start_looks_at_what_is_at_hand_however_old_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    connect = kept_module._connect

    def counted(name: str) -> sqlite3.Connection:
        made = connect(name)
        made.set_progress_handler(count, 1)
        return made

    monkeypatch.setattr(kept_module, "_connect", counted)
    took = []
    for cycles in (20, 200):
        folder = tmp_path / str(cycles)
        kept = at(folder)
        for cycle in range(1, cycles + 1):
            for miner in range(50):
                kept.put(trained(cycle, f"m{miner:02}"))
        assert kept.commit({"TRAIN": record(1)})
        kept.close()
        steps = 0
        kept = at(folder)
        assert kept.positions()
        assert len(list(kept.since("r", cycles - 2))) == 3 * 50
        took.append(steps)
        kept.close()
    assert took[1] - took[0] < 20 * 180, "a few steps for each cycle, none for its rows"


@pytest.mark.parametrize(
    "ask", [lambda kept: kept.all("r", "ingress", 2, "trained"), lambda kept: kept.put(trained(2, "c"))]
)
def test_a_row_that_is_gone_of_an_old_cycle_is_missed_by_who_asks_or_adds(
    ask: Callable[[Kept], object], filled: Path
) -> None:
    damage(filled, "delete from facts where cycle = 2 and id = 'a'")
    kept = at(filled)
    assert kept.positions()
    assert {fact.key.cycle for fact in kept.since("r", 3)} == {3, 4}
    with pytest.raises(Fatal, match="damaged"):
        ask(kept)
    kept.close()
    assert not at(filled).positions(), "and the next process reads everything anew"


def test_a_file_that_fails_when_it_is_written_is_not_believed_again(filled: Path) -> None:
    kept = at(filled)
    kept._give_up(damaged_while_written(filled))
    assert kept.closed_for_writing
    kept.close()
    assert not at(filled).positions()


def damaged_while_written(folder: Path) -> sqlite3.DatabaseError:
    """What SQLite raises for a file whose pages are not what they should be."""
    other = folder / "other.sqlite"
    other.write_bytes(b"SQLite format 3\x00" + b"\xcc" * 8192)
    with closing(sqlite3.connect(other)) as damaged, pytest.raises(sqlite3.DatabaseError) as raised:
        damaged.execute("create table a (b)")
    return raised.value
