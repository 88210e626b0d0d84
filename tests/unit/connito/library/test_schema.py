"""Records from outside fit the schema, or are refused with the field that does not and what to do."""

from __future__ import annotations

import json
from typing import Any

import pytest
from connito.errors import Invalid
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
