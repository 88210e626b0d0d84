from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from connito.library.card import render, write_card
from connito.library.record import build_record, encode
from connito.v1 import run_pb2
from connito.wire.facts import RunFacts

from .conftest import Pairs


def test_the_head_is_yaml_that_model_hubs_read(finished: RunFacts) -> None:
    from yaml import safe_load

    record = build_record(finished, "e" * 64, 1200, 300)
    head = safe_load(render(record).split("---\n")[1])
    assert (head["license"], head["base_model"], head["library_name"]) == ("cc-by-4.0", "smol", "connito")
    assert "medical" in head["tags"]
    results = head["model-index"][0]["results"]
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in results] == [("medical", 2.5), ("code", 2.001)]


def test_intervals_parents_and_plots_are_in_it(finished: RunFacts, tmp_path: Path) -> None:
    record = build_record(finished, "e" * 64, 1200, 300)
    record["losses"][0] |= {"change_low": -0.6, "change_high": -0.4}
    write_card(record, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "| medical | 3.0000 | 2.5000 | -0.5000 | 640 | -0.6000 to -0.4000 |" in card
    assert "| made from | the base |" in card
    for name in ("losses.svg", "experts.svg"):
        assert f"]({name})" in card
        ElementTree.parse(tmp_path / name)


def test_what_people_wrote_cannot_leave_its_place(finished: RunFacts, tmp_path: Path) -> None:
    record = json.loads(json.dumps(build_record(finished, "e" * 64, 1200, 300)))
    record["base"]["name"] = 'a"\n---\n<script>'
    record["losses"][0]["domain"] = "<script>"
    write_card(record, tmp_path)
    assert "\n---\n<script>" not in (tmp_path / "README.md").read_text()
    assert "<script>" not in (tmp_path / "losses.svg").read_text()


def test_records_and_their_cards_are_the_same_bytes_in_every_version(finished: RunFacts) -> None:
    # A deposit in the log names both digests, and whoever audits an old run makes them again.
    record = build_record(finished, "e" * 64, 1200, 300)
    digests = [hashlib.sha256(data).hexdigest()[:16] for data in (encode(record), render(record).encode())]
    assert digests == ["a2512cf8e7d5794b", "b7fab8e2db1b0caa"]


@pytest.mark.parametrize(
    ("visibility", "organisation", "said"),
    [("", "", "everybody"), ("private", "", "its owner alone"), ("organisation", "clinic", "members of clinic")],
)
def test_a_card_says_in_words_who_sees_an_expert_and_where_its_base_is(
    pairs: Pairs, rebuild: Callable[[Pairs], RunFacts], visibility: str, organisation: str, said: str
) -> None:
    created = next(message for _, message in pairs if isinstance(message, run_pb2.RunCreated))
    created.spec.visibility, created.spec.organisation = visibility, organisation
    record = build_record(rebuild(pairs), "e" * 64, 1200, 300)
    record["lineage"] = record["lineage"][:1]
    card = render(record)
    assert f"| visible to | {said} |" in card
    assert 'from_pretrained("path/to/smol")' in card
    assert "run `run-1`, 1 version, finished" in card
    record["base"]["name"] = "ada/smol-2"
    assert 'from_pretrained("ada/smol-2")' in render(record), "a hub has it"
