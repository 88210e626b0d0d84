"""A library in a folder: its journal is the truth, its index a projection."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.library.artifact import ExpertHeader, tensor_sizes, write_expert
from connito.library.derived import derived_record
from connito.library.hits import search
from connito.library.record import build_record, encode
from connito.library.schema import ExpertRecord
from connito.library.shelf import Shelf
from connito.wire.facts import RunFacts

from tests.support.library import contents


def state_file(path: Path, fill: int) -> Path:
    data = bytes([fill]) * 16
    header = json.dumps({"layers.2.down_proj": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.fixture
def make(tmp_path: Path, finished: RunFacts) -> Callable[..., Any]:
    """An expert file and the record of the finished run."""

    def build(fill: int = 1) -> tuple[Path, ExpertHeader, ExpertRecord]:
        header = ExpertHeader("medical", "smol", "b" * 64, {2: [1, 5], 3: [0]}, "run-1", 2)
        path = tmp_path / f"expert-{fill}.safetensors"
        digest = write_expert(state_file(tmp_path / "state.safetensors", fill), path, header)
        return path, header, build_record(finished, digest, path.stat().st_size, tensor_sizes(path)[0])

    return build


def test_a_deposit_is_an_export_in_a_folder_and_is_found(tmp_path: Path, make: Callable[..., Any]) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    name = shelf.deposit(path, record, 5)
    assert shelf.deposit(path, record, 6) == name
    folder, stored = shelf.get(name)
    assert stored == record
    assert (folder / "expert.safetensors").read_bytes() == path.read_bytes()
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: connito\n")
    assert f"\n---\n\n# {name}\n" in card
    assert len(list(shelf.events())) == 1
    with shelf.index() as index:
        assert [hit.expert_id for hit in search(index, "symptoms")] == [name]
        assert index.record(name) == record


def test_the_index_follows_the_journal_and_can_be_deleted(tmp_path: Path, make: Callable[..., Any]) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    name = shelf.deposit(path, record, 5)
    with shelf.index() as index:
        assert search(index, "medical")
    shelf.state("yanked", name, "leaked", 6)
    shelf.meter(name, "export", "anna", 7)
    with shelf.index() as index:
        assert search(index, "medical") == []
        before = contents(index)
    (tmp_path / "shelf" / "index.sqlite").unlink()
    with shelf.index() as index:
        assert contents(index) == before
        assert index.usage(name) == {"export": 1}


def test_file_and_record_must_belong_together(tmp_path: Path, make: Callable[..., Any]) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    with pytest.raises(VerificationFailed, match="digest"):
        shelf.deposit(path, record | {"expert": record["expert"] | {"digest": "0" * 64}}, 5)
    with pytest.raises(VerificationFailed, match="domain"):
        shelf.deposit(path, record | {"domain": "law"}, 5)
    with pytest.raises(Invalid, match="not an expert id"):
        shelf.deposit(path, record | {"expert_id": "../out"}, 5)
    assert list(shelf.events()) == []


def test_statements_need_an_expert_and_a_reason(tmp_path: Path, make: Callable[..., Any]) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    name = shelf.deposit(path, record, 5)
    with pytest.raises(Invalid, match="a reason is required"):
        shelf.state("yanked", name, " ", 6)
    with pytest.raises(NotFound):
        shelf.state("yanked", "nobody", "why not", 6)


def test_a_record_that_was_changed_on_disk_is_noticed(tmp_path: Path, make: Callable[..., Any]) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    folder = shelf.path(shelf.deposit(path, record, 5))
    (folder / "record.json").write_bytes(encode(record | {"license": "CC0-1.0"}))
    with pytest.raises(VerificationFailed, match="not the one that was deposited"):
        list(shelf.events())


def test_a_composition_credits_its_parents_and_keeps_their_rules(tmp_path: Path, make: Callable[..., Any]) -> None:
    _, header, one = make(1)
    two = make(2)[2]
    two["governance"] = {"visibility": "private", "owner": "anna", "sources": ["letters"]}
    digest = hashlib.sha256(b"x").hexdigest()
    made = derived_record(
        "compose", header, [(one, 3.0), (two, 1.0)], digest=digest, size=1, parameters=1, created="2030-01-01T00:00:00",
        license="CC-BY-4.0", settings={"method": "linear"},
    )  # fmt: skip
    assert made["governance"]["visibility"] == "private"
    assert made["governance"]["sources"] == sorted(["letters", *filter(None, [one["training_data"]])])
    assert [row["share"] for row in made["contributors"]] == pytest.approx([0.6, 0.4, 0.0])
    assert [parent["weight"] for parent in made["derived"]["parents"]] == [3.0, 1.0]
    one["governance"] = {"visibility": "private", "owner": "bert"}
    with pytest.raises(Invalid, match="shown to none"):
        derived_record("compose", header, [(one, 1.0), (two, 1.0)], digest=digest, size=1, parameters=1, created="",
                       license="", settings={})  # fmt: skip


def test_a_record_that_lost_a_field_on_disk_is_refused_with_its_name(tmp_path: Path, make: Callable[..., Any]) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    name = shelf.deposit(path, record, 5)
    (shelf.path(name) / "record.json").write_text(json.dumps({key: record[key] for key in record if key != "losses"}))
    with pytest.raises(Invalid, match=r"record\.json is no record of a library expert: losses: field required"):
        shelf.get(name)


def test_an_entry_that_was_cut_off_is_as_if_it_had_not_been_written(tmp_path: Path, make: Callable[..., Any]) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    name = shelf.deposit(path, record, 5)
    journal = shelf.root / "journal.jsonl"
    whole = journal.read_bytes()
    shelf.meter(name, "compose", "me", 6)
    both = journal.read_bytes()
    for length in range(len(whole), len(both)):
        journal.write_bytes(both[:length])
        assert [event.kind for event in shelf.events()] == ["deposited"]
        shelf.meter(name, "compose", "me", 7)
        assert [(event.kind, event.time_unix_ms) for event in shelf.events()] == [("deposited", 5), ("used", 7)]


def test_an_expert_that_was_placed_and_not_written_down_is_written_down(
    tmp_path: Path, make: Callable[..., Any]
) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    name = shelf.deposit(path, record, 5)
    (shelf.root / "journal.jsonl").write_bytes(b"")
    assert shelf.deposit(path, record, 6) == name
    assert [(event.kind, event.subject) for event in shelf.events()] == [("deposited", name)]


def test_an_expert_whose_entry_was_cut_off_is_not_held_until_it_is_deposited_again(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    shelf, (path, _, record) = Shelf(tmp_path / "shelf"), make()
    shelf.deposit(path, record, 1)
    assert shelf.held() == {record["expert_id"]}
    journal = shelf.root / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-5])
    (shelf.root / "index.sqlite").unlink()
    assert shelf.held() == set(), "its folder is there, and nothing finds it"
    shelf.deposit(path, record, 2)
    assert shelf.held() == {record["expert_id"]}
