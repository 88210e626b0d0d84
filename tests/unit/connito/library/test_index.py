"""The index is a projection: whatever the order, once or twice, the same log gives the same index."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.library.governance import Viewer
from connito.library.hits import Hit, rank, search
from connito.library.index import Index, LibraryEvent, deposit_event
from connito.v1 import artifacts_pb2, run_pb2
from connito.wire.fact import Fact
from connito.wire.subjects import FactKey
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.library import contents, expert_record


def record(
    name: str, domain: str = "medical", saved: float = 0.1, statement: str = "", **rules: object
) -> dict[str, Any]:
    return {
        "expert_id": name,
        "domain": domain,
        "base": {"name": "smol", "manifest": "b" * 64},
        "losses": [{"domain": domain, "before": 3.0, "after": 3.0 - saved, "tokens": 10}],
        "license": "CC-BY-4.0",
        "data_statement": statement,
        "governance": rules,
    }


def deposited(sequence: int, name: str, *args: Any, **kwargs: Any) -> LibraryEvent:
    return LibraryEvent(sequence, sequence, "deposited", name, record(name, *args, **kwargs))


LOG = [
    deposited(1, "medical-1", "medical", 0.1, "definitions of symptoms", sources=["hpo"]),
    deposited(2, "medical-2", "medical", 0.3, "discharge letters"),
    deposited(3, "code-1", "code", 0.2, "the standard library; symptoms of rot"),
    deposited(4, "medical-1", "medical", 9.9, "a second deposit under the same id"),
    LibraryEvent(5, 5, "yanked", "code-1", {"reason": "leaked data"}),
    LibraryEvent(6, 6, "deprecated", "medical-2", {"reason": "see medical-3"}),
    LibraryEvent(7, 7, "restored", "code-1", {"reason": "it was clean"}),
    LibraryEvent(8, 8, "used", "code-1", {"verb": "export", "by": "anna", "units": 3}),
    LibraryEvent(9, 9, "used", "code-1", {"verb": "export", "by": "bert"}),
]


def build(events: list[LibraryEvent]) -> Index:
    index = Index()
    index.apply(events)
    return index


@settings(max_examples=40, deadline=None)
@given(st.permutations(LOG), st.lists(st.sampled_from(LOG), max_size=5), st.integers(0, len(LOG)))
def test_order_repetition_and_pieces_make_no_difference(
    order: list[LibraryEvent], again: list[LibraryEvent], cut: int
) -> None:
    index = Index()
    index.apply(order[:cut])
    index.apply([*again, *order[cut:]])
    assert contents(index) == contents(build(LOG))


def test_the_last_sequence_is_where_to_read_on() -> None:
    index = build(LOG)
    assert index.last_sequence() == 9


def test_a_file_survives_and_a_damaged_one_is_built_again(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    with Index(path) as index:
        index.apply(LOG)
    with Index(path) as index:
        assert index.apply(LOG) == 0
        assert index.count() == 3
    path.write_bytes(b"this is not a database" * 100)
    with Index(path) as index:
        assert index.count() == 0
        assert index.apply(LOG) == len(LOG)


def test_an_entry_that_cannot_be_read_leaves_the_index_as_it_was() -> None:
    index = build(LOG)
    before = contents(index)
    with pytest.raises(Invalid, match="of kind 'burnt'"):
        index.apply([deposited(30, "new-1"), LibraryEvent(31, 0, "burnt", "code-1")])
    assert contents(index) == before


def test_words_find_experts_best_match_first() -> None:
    index = build(LOG)
    assert [hit.expert_id for hit in search(index, "symptoms")] == ["medical-1", "code-1"]
    assert [hit.expert_id for hit in search(index, "discharge symp")] == ["medical-2", "medical-1", "code-1"]
    assert [hit.expert_id for hit in search(index, 'discharge "LETT')] == ["medical-2"]
    assert [hit.expert_id for hit in search(index, "code")] == ["code-1"]
    assert search(index, "unicorns") == []


def test_without_words_the_largest_saving_comes_first_within_a_domain() -> None:
    index = build(LOG)
    assert [hit.expert_id for hit in search(index)] == ["medical-2", "code-1", "medical-1"]
    assert [hit.expert_id for hit in search(index, domain="medical")] == ["medical-2", "medical-1"]
    assert search(index, domain="medical", base_digest="c" * 64) == []


def test_yanked_and_opted_out_experts_are_not_found_until_they_stand_again() -> None:
    index = build(LOG[:6])
    assert [hit.expert_id for hit in search(index)] == ["medical-2", "medical-1"]
    index.apply([LibraryEvent(10, 0, "opted-out", "hpo", {"reason": "asked to"})])
    assert [hit.expert_id for hit in search(index)] == ["medical-2"]
    shown = {hit.expert_id: hit.standing.status for hit in search(index, everything=True)}
    assert shown == {"medical-1": "opted-out", "medical-2": "deprecated", "code-1": "yanked"}
    index.apply([LOG[6], LibraryEvent(11, 0, "opted-in", "hpo", {"reason": "agreed"})])
    assert len(search(index)) == 3


def test_what_is_not_public_shows_to_its_people_only() -> None:
    private = deposited(1, "mine", visibility="private", owner="anna")
    team = deposited(2, "ours", visibility="organisation", organisation="acme", owner="bert")
    index = build([private, team])

    def seen(viewer: Viewer) -> set[str]:
        return {hit.expert_id for hit in search(index, "medical", viewer=viewer)}

    assert seen(Viewer()) == set()
    assert seen(Viewer("anna")) == {"mine"}
    assert seen(Viewer("carl", frozenset({"acme"}))) == {"ours"}
    assert seen(Viewer("bert")) == {"ours"}
    assert seen(Viewer("", frozenset({""}))) == set()


def test_use_is_metered_by_verb() -> None:
    assert build(LOG).usage("code-1") == {"export": 4}
    assert build(LOG).usage("medical-1") == {}


def test_an_unknown_expert_is_not_found() -> None:
    with pytest.raises(NotFound, match="library search"):
        build(LOG).record("nobody-1")


def test_a_deposit_on_the_stream_must_bring_its_own_record() -> None:
    data = json.dumps(expert_record("medical-1", "medical")).encode()
    ref = artifacts_pb2.ArtifactRef(digest=hashlib.sha256(data).hexdigest())
    message = run_pb2.ExpertDeposited(expert_id="medical-1", record=ref)
    fact = Fact("run-1", FactKey("library", 0, "deposited", "medical-1"), message, "UX", "LIBRARY", 7, 70)

    event = deposit_event(fact, data)

    assert (event.sequence, event.kind, event.subject, event.origin) == (7, "deposited", "medical-1", "LIBRARY")
    assert build([event]).record("medical-1")["domain"] == "medical"
    with pytest.raises(VerificationFailed, match="not the one that was deposited"):
        deposit_event(fact, data + b" ")


def test_measured_experts_rank_before_predicted_ones() -> None:
    hits: list[Hit] = search(build(LOG))
    ranked = rank(hits, {"medical-1": 0.9, "medical-2": 0.5, "code-1": 0.4}, {"medical-2": 0.1, "code-1": 0.3})
    assert [row.expert_id for row in ranked] == ["code-1", "medical-2", "medical-1"]
    assert ranked[-1].measured is None
