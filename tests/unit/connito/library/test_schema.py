"""Records from outside fit the schema, or are refused with the field that does not and what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from connito.errors import Invalid
from connito.library import schema
from connito.library.derived import model_record
from connito.library.record import build_record, encode
from connito.library.schema import read_record
from connito.wire.facts import RunFacts

from tests.support.library import expert_record


def test_what_a_run_writes_fits_and_is_handed_on_as_it_came(finished: RunFacts) -> None:
    data = encode(build_record(finished, "e" * 64, 1200, 300))
    assert encode(read_record(data, "record.json")) == data


def test_a_model_without_parents_fits() -> None:
    made = model_record(
        "prune", "law", {"name": "smol", "manifest": "b" * 64}, [], digest="d" * 64, size=1, parameters=1,
        keep={2: [0]}, total=8, created="2031", license="MIT", settings={}, losses=[],
    )  # fmt: skip
    assert read_record(encode(made), "record.json") == made


def test_fields_of_a_later_version_stay() -> None:
    later = {**expert_record("law-1", "law"), "colour": "blue"}
    assert read_record(json.dumps(later), "record.json") == later


def without(*path: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(json.dumps(expert_record("law-1", "law")))
    place = record
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return record


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        (without("losses"), "losses: field required"),
        (without("base", "manifest"), "base.manifest: field required"),
        (expert_record("law-1", "law") | {"parents": "nobody"}, "parents: input should be a valid list"),
        ([], "it: input should be a valid dictionary"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_field_and_a_remedy(document: object, fault: str) -> None:
    with pytest.raises(Invalid, match="get the record again from the library") as refused:
        read_record(json.dumps(document), "expert/record.json")
    assert str(refused.value).startswith(f"expert/record.json is no record of a library expert: {fault}")


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(Invalid, match="it is not JSON"):
        read_record(b"{", "record.json")


MODEL = {**expert_record("law-1", "law"), "format": "connito-model/1"}
FILE = {"digest": "d" * 64, "bytes": 3}


@pytest.mark.parametrize(
    "name",
    [
        "../pwned",
        "/tmp/pwned",
        "a/b",
        "..",
        ".bashrc",
        "",
        "a\\b",
        "c:evil",
        "a\x00",
        "a\n",
        "a\x1b[2J",
        "x" * 300,
        "\ud800",
    ],
)
def test_a_name_that_leads_out_of_a_folder_is_refused(name: str) -> None:
    with pytest.raises(Invalid, match="no record of a library expert"):
        read_record(json.dumps({**MODEL, "files": {name: FILE}}), "it")
    with pytest.raises(Invalid, match="no record of a library expert"):
        read_record(json.dumps({**MODEL, "expert_id": name}), "it")


@pytest.mark.parametrize(
    "strange",
    [
        {"model_parameters": "1000"},
        {"model_parameters": True},
        {"model_parameters": 1 << 64},
        {"model_parameters": 1.0},
        {"losses": [{"domain": "law", "before": float("nan"), "after": 2.5, "tokens": 10}]},
        {"losses": [{"domain": "law", "before": float("inf"), "after": 2.5, "tokens": 10}]},
        {"domain": "law\x1b]0;owned\x07"},
        {"data_statement": "half a character \ud83d"},
        {"settings": {"deep": [{"x": float("-inf")}]}},
        {"tags": ["\x9b2J"]},
    ],
)
def test_values_that_break_who_reads_them_are_refused(strange: dict[str, Any]) -> None:
    with pytest.raises(Invalid, match=r"get the record again|get it again"):
        read_record(json.dumps({**expert_record("law-1", "law"), **strange}), "it")


def test_text_of_any_language_and_lines_stay() -> None:
    said = {**expert_record("law-1", "droit\u00a0français, قانون"), "data_statement": "one\n\ttwo\r\n"}
    assert read_record(json.dumps(said), "it") == said


def test_what_only_the_reader_of_json_can_follow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python 3.12 on it goes deeper than a function may."""
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    record = {**expert_record("law-1", "law"), "settings": {"deep": deep}}
    monkeypatch.setattr(schema, "parse_json", lambda _: record)
    with pytest.raises(Invalid, match="get it again"):
        read_record(b"", "it")
