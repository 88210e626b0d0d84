"""What a notebook shows: builtins with a rich form, in which no stranger's word is markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from connito.library.hits import Ranked
from connito.v1.run_pb2 import RunSpec
from connito.v1.services_pb2 import RUN_PHASE_RUNNING, ExpertSummary, RunStatus
from connito.views.notebook import MOST_ROWS, Card, Expert, Report, Rows

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>"
RECORD = {
    "expert_id": HOSTILE, "domain": HOSTILE, "base": {"name": HOSTILE}, "license": HOSTILE, "data_statement": HOSTILE,
    "created": HOSTILE, "expert": {"parameters": HOSTILE},
    "selection": {"selected": HOSTILE, "total": HOSTILE, "layers": {"0": [1, 2]}},
    "losses": [{"domain": HOSTILE, "before": 2.0, "after": 1.5, "tokens": 10}],
}  # fmt: skip
CYCLE = {"domains": {HOSTILE: {"before": 2.0, "after": 1.5}}}
REPORT = {"run": HOSTILE, "domain": HOSTILE, "outcome": {"status": "completed", "detail": HOSTILE}, "cycles": [CYCLE]}


class Tags(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def shown(value: object) -> str:
    """What a notebook asks for."""
    return str(getattr(value, "_repr_html_")())  # noqa: B009 - the name that notebooks look for


def test_no_word_of_a_stranger_is_markup() -> None:
    expert = Expert(ExpertSummary(), RECORD)  # type: ignore[arg-type]
    status = RunStatus(spec=RunSpec(run=HOSTILE, domain=HOSTILE), detail=HOSTILE)
    lists = Rows([{HOSTILE: HOSTILE}]), Rows([status]), Rows([ExpertSummary(expert_id=HOSTILE)]), Rows([HOSTILE])
    for value in (*lists, Card(record=RECORD), expert, Report(REPORT)):
        page, tags = shown(value), Tags(shown(value))
        assert "&lt;script&gt;" in page
        assert not tags.names & {"script", "img"}
        assert not {name for name in tags.attributes if name.startswith("on")}


def test_a_run_has_its_curve_and_a_record_its_picture() -> None:
    assert {"svg", "polyline"} <= Tags(shown(Report(REPORT))).names
    assert {"svg", "h3"} <= Tags(shown(Card(record=RECORD))).names


@pytest.mark.parametrize(
    "layers",
    [
        {"0": [10**15]},
        {"0": [-1]},
        {"first": [0]},
        {"²": [0]},
        {"9" * 5000: [0]},
        {str(layer): [5000] for layer in range(100)},
        {"0": []},
        {},
    ],
    ids=range(8),
)
def test_a_card_is_shown_whatever_its_record_says_of_layers(layers: dict[str, list[int]]) -> None:
    """Of a model that a customer deposits, only the files and the parents are checked."""
    record = {**RECORD, "selection": {"layers": layers}}
    page = Card(record=record)._repr_html_()
    assert ("Experts by layer" in page) is (layers == {"0": []})


def test_rows_are_a_table_of_what_they_have() -> None:
    page = shown(Rows([Ranked("law-1", "law", 0.25), {"expert_id": "code-2", "standing": "yanked"}]))
    assert "<th>expert_id</th><th>domain</th>" in page
    assert "<td>law-1</td>" in page
    assert "<td>yanked</td>" in page
    running = RunStatus(spec=RunSpec(run="r1"), phase=RUN_PHASE_RUNNING)
    assert "<td>r1</td><td></td><td>running</td>" in shown(Rows([running]))
    assert shown(Rows[int]()) == "<p>none</p>"
    assert shown(Rows(range(MOST_ROWS + 3))).endswith("<p>and 3 more</p>")


def test_they_are_the_builtins_that_they_were() -> None:
    assert Rows([1, 2]) == [1, 2]
    assert json.loads(json.dumps([Rows([1]), Card(record={}), Report(run="r")])) == [[1], {"record": {}}, {"run": "r"}]


def test_an_interpreter_shows_a_list_as_a_table_of_plain_signs() -> None:
    """A list of one run was eight thousand characters of its wire format."""
    runs = [RunStatus(spec=RunSpec(run="r1", domain="law"), phase=RUN_PHASE_RUNNING, detail="\x1b[2J" + "x" * 200)] * (
        MOST_ROWS + 3
    )
    head, first, *_, last = repr(Rows(runs)).splitlines()
    assert head.split() == ["run", "domain", "phase", "cycle", "version", "detail"]
    assert first.split()[:5] == ["r1", "law", "running", "0", "0"]
    assert first.index("law") == head.index("domain")
    assert "\x1b" not in first
    assert len(first) < 200
    assert last == "and 3 more"
    assert repr(Rows([{"a": "it's"}, {"b": 2}])).splitlines() == ["a     b", "it's", "      2"]
    assert repr(Rows([])) == "none"
    assert Rows([1]) == [1]
