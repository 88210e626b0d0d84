"""The ledger as a signed file: every unit of it, for a program and a spreadsheet, and nothing that was changed since."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from connito.client import payouts, runs
from connito.errors import ConnitoError, Invalid, NotFound, VerificationFailed
from connito.views.ledger import Entry, entries
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity

from tests.unit.connito.audit.world import RUN, tell


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    return tell(tmp_path_factory.mktemp("paid")).evidence().facts


@pytest.fixture(autouse=True)
def installation(facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    async def found(run: str, *_: object) -> RunFacts:
        if run != facts.run:
            raise NotFound(f"the log has no run {run!r}")
        return facts

    monkeypatch.setattr(runs, "_facts", found)
    monkeypatch.delenv("CONNITO_KEY_FILE", raising=False)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    Identity.generate(b"k" * 32).save(tmp_path / "exporter.nk")
    return tmp_path / "exporter.nk"


def read_csv(file: Path) -> list[dict[str, Any]]:
    with file.open(newline="") as lines:
        return [{n: int(v) if n in payouts.WHOLE else v for n, v in row.items()} for row in csv.DictReader(lines)]


def read_parquet(file: Path) -> list[dict[str, Any]]:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows: list[dict[str, Any]] = parquet.read_table(file).to_pylist()
    return rows


@pytest.mark.parametrize(("name", "read"), [("p.csv", read_csv), ("p.parquet", read_parquet)])
def test_a_file_has_every_entry_of_the_ledger(
    name: str, read: Callable[[Path], list[dict[str, Any]]], facts: RunFacts, key: Path, tmp_path: Path
) -> None:
    made = payouts.export(RUN, tmp_path / name, key)
    rows = read(tmp_path / name)
    columns = set(payouts.COLUMNS)
    assert rows == [{n: v for n, v in {"run": RUN, **e.to_json()}.items() if n in columns} for e in entries(facts)]
    assert made["rows"] == len(rows) > 4
    emission = facts.spec.emission if facts.spec is not None else 0
    assert {c: sum(r["units"] for r in rows if r["cycle"] == c) for c in (1, 2)} == {1: emission, 2: emission}
    verified = payouts.verify(tmp_path / name, Identity.load(key).public)
    assert verified["signer"] == made["signer"] == Identity.load(key).public
    first = (tmp_path / name).read_bytes()
    payouts.export(RUN, tmp_path / name, key)
    assert (tmp_path / name).read_bytes() == first


def test_what_a_miner_calls_itself_is_no_formula_in_a_spreadsheet(
    facts: RunFacts, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [replace(entry, name="=HYPERLINK(1)") for entry in entries(facts)]
    monkeypatch.setattr(runs, "entries", lambda _: named)
    payouts.export(RUN, tmp_path / "p.csv", key)
    assert {cell[:1] for row in read_csv(tmp_path / "p.csv") for cell in map(str, row.values())}.isdisjoint("=+-@\t")


def test_nothing_is_written_of_a_ledger_that_does_not_add_up(
    facts: RunFacts, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(facts: RunFacts) -> list[Entry]:
        first, *others = entries(facts)
        return [replace(first, units=first.units + 1), *others]

    monkeypatch.setattr(runs, "entries", short)
    with pytest.raises(VerificationFailed, match="does not add up: cycle 1"):
        payouts.export(RUN, tmp_path / "p.csv", key)
    assert not (tmp_path / "p.csv").exists()


def test_a_changed_byte_or_another_key_is_found(key: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    payouts.export(RUN, file, key)
    content, note = file.read_bytes(), json.loads(payouts.signature_of(file).read_text())
    for place in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(VerificationFailed, match="is not what U"):
            payouts.verify(file)
    file.write_bytes(content + b"\n")
    with pytest.raises(VerificationFailed):
        payouts.verify(file)
    file.write_bytes(content)
    other = Identity.generate()
    with pytest.raises(VerificationFailed, match=f"not by {other.public}"):
        payouts.verify(file, other.public)
    payouts.signature_of(file).write_text(json.dumps({**note, "signer": other.public}))
    with pytest.raises(VerificationFailed):
        payouts.verify(file)


@pytest.mark.parametrize(
    "note", ["", "[]", "null", "{}", '{"signer": "U", "signature": "zz"}', '{"signer": [], "signature": 3}', "[" * 9999]
)
def test_a_signature_that_is_none_is_said_to_be_none(note: str, key: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    payouts.export(RUN, file, key)
    payouts.signature_of(file).write_text(note)
    with pytest.raises(Invalid, match="is no signature"):
        payouts.verify(file)
    payouts.signature_of(file).unlink()
    with pytest.raises(NotFound, match=r"p\.csv\.sig"):
        payouts.verify(file)


@pytest.mark.parametrize(
    ("run", "name", "error", "said"),
    [
        (RUN, "p.xlsx", Invalid, r"end in \.csv or \.parquet"),
        (RUN, "p", Invalid, r"end in \.csv or \.parquet"),
        (RUN, "none/p.csv", NotFound, "no folder"),
        ("none", "p.csv", NotFound, "no run 'none'"),
    ],
)
def test_what_cannot_be_exported(
    run: str, name: str, error: type[ConnitoError], said: str, key: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        payouts.export(run, tmp_path / name, key)


def test_who_exports_signs_with_the_key_of_where_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"folder": b"f" * 32, "data": b"d" * 32, "here": b"h" * 32}
    public = {}
    for name, seed in names.items():
        identity = Identity.generate(seed)
        identity.save(tmp_path / name / "keys" / "customer.nk")
        public[name] = identity.public
    folder, data, file = tmp_path / "folder", tmp_path / "data", tmp_path / "p.csv"
    monkeypatch.setenv("CONNITO_KEY_FILE", str(tmp_path / "here" / "keys" / "customer.nk"))
    assert payouts.export(RUN, file)["signer"] == public["here"]
    assert payouts.export(RUN, file, folder=folder)["signer"] == public["folder"]
    assert payouts.export(RUN, file, data_dir=data)["signer"] == public["data"]
