from __future__ import annotations

import hashlib
import json

import pytest
from connito.errors import Invalid, NotFound
from connito.library.governance import Viewer
from connito.v1 import artifacts_pb2, run_pb2, services_pb2
from connito.wire.fact import Fact
from connito.wire.subjects import FactKey

from services.library.state import Catalogue
from tests.support.library import expert_record


def deposit(number: int) -> Fact:
    message = run_pb2.ExpertDeposited(run=f"run-{number}", expert_id=f"code-{number}", domain="code")
    return Fact(
        message.run, FactKey("library", 0, "deposited", message.expert_id), message, "UL", "LIBRARY", number, number
    )


@pytest.fixture
def catalogue() -> Catalogue:
    found = Catalogue()
    for number in (3, 1, 5, 2, 4, 1):
        found.add(deposit(number))
    return found


def test_pages_are_in_the_order_of_the_log_and_end(catalogue: Catalogue) -> None:
    seen, token = [], ""
    for _ in range(3):
        experts, token = catalogue.page(2, token)
        seen.append([expert.expert_id for expert in experts])

    assert seen == [["code-1", "code-2"], ["code-3", "code-4"], ["code-5"]]
    assert token == ""


def test_a_deposit_between_two_pages_shifts_nothing(catalogue: Catalogue) -> None:
    _, token = catalogue.page(4, "")
    catalogue.add(deposit(6))

    experts, _ = catalogue.page(4, token)

    assert [expert.expert_id for expert in experts] == ["code-5", "code-6"]


@pytest.mark.parametrize("token", ["x", "YWZ0ZXI6eA==", "ß"])
def test_a_foreign_page_token_is_refused(catalogue: Catalogue, token: str) -> None:
    with pytest.raises(Invalid, match="not a page token"):
        catalogue.page(2, token)


def private(number: int) -> bytes:
    rules = {"visibility": "private", "owner": "UO", "sources": ["corpus"]}
    record = expert_record(f"law-{number}", "law") | {"data_statement": "statutes", "governance": rules}
    return json.dumps(record).encode()


def law(number: int, owner: str = "UO") -> tuple[Fact, bytes]:
    record = private(number).replace(b'"UO"', f'"{owner}"'.encode())
    ref = artifacts_pb2.ArtifactRef(digest=hashlib.sha256(record).hexdigest())
    message = run_pb2.ExpertDeposited(run="run-9", expert_id=f"law-{number}", domain="law", record=ref)
    return Fact("run-9", FactKey("library", 0, "deposited"), message, "UL", "LIBRARY", number, number), record


def test_what_is_private_is_there_for_its_owner_only(catalogue: Catalogue) -> None:
    catalogue.add(*law(7))
    owner, everybody = Viewer("UO"), Viewer("UX")
    assert catalogue.get("law-7", owner).domain == "law"
    with pytest.raises(NotFound):
        catalogue.get("law-7", everybody)
    assert [len(catalogue.page(50, "", viewer)[0]) for viewer in (owner, everybody)] == [6, 5]
    asked = services_pb2.SearchExpertsRequest(text="statutes")
    assert [len(catalogue.search(asked, viewer)[0]) for viewer in (owner, everybody)] == [1, 0]


def test_searches_come_in_pages(catalogue: Catalogue) -> None:
    seen, token = [], ""
    while True:
        request = services_pb2.SearchExpertsRequest(text="code", page_size=2, page_token=token)
        hits, token = catalogue.search(request, Viewer())
        seen += [hit.expert.expert_id for hit in hits]
        if not token:
            break
    assert sorted(seen) == [f"code-{n}" for n in range(1, 6)]


def said(sequence: int, kind: run_pb2.NoticeKind.ValueType, subject: str) -> Fact:
    notice = run_pb2.ExpertNotice(run="run-2", id=str(sequence), subject=subject, kind=kind, reason="wrong")
    return Fact("run-2", FactKey("library", 0, "notice", notice.id), notice, "UL", "LIBRARY", sequence, sequence)


def test_notices_and_uses_are_projected_once(catalogue: Catalogue) -> None:
    used = run_pb2.ExpertUsed(run="run-2", id="a", expert_id="code-2", verb="export", units=3, by="UX")
    fact = Fact("run-2", FactKey("library", 0, "used", "a"), used, "UL", "LIBRARY", 20, 20)
    for _ in range(2):
        catalogue.add(fact)
        catalogue.add(said(21, run_pb2.NOTICE_KIND_YANKED, "code-2"))
    assert catalogue.index.standing("code-2").status == "yanked"
    assert {row.expert_id: (row.status, row.reason) for row in catalogue.page(0, "")[0]}["code-2"] == (
        "yanked",
        "wrong",
    )
    assert catalogue.get("code-2").status == "yanked"
    ledger = catalogue.ledger("code-2", Viewer())
    assert (dict(ledger.uses), ledger.uncredited) == ({"export": 3}, 3)
    asked = services_pb2.SearchExpertsRequest(text="code")
    assert len(catalogue.search(asked, Viewer())[0]) == 4
    asked.everything = True
    assert {hit.status for hit in catalogue.search(asked, Viewer())[0]} == {"good", "yanked"}


def test_an_owner_speaks_of_the_own_expert_and_of_sources_in_it(catalogue: Catalogue) -> None:
    catalogue.add(*law(7))
    assert catalogue.may_state("UO", run_pb2.NOTICE_KIND_YANKED, "law-7")
    assert catalogue.may_state("UO", run_pb2.NOTICE_KIND_OPTED_OUT, "corpus")
    assert not catalogue.may_state("UX", run_pb2.NOTICE_KIND_YANKED, "law-7")
    assert not catalogue.may_state("UO", run_pb2.NOTICE_KIND_OPTED_OUT, "another")


def test_whoever_names_anothers_source_gets_no_say_over_it(catalogue: Catalogue) -> None:
    catalogue.add(*law(7))
    catalogue.add(*law(8, "UX"))
    assert not catalogue.may_state("UX", run_pb2.NOTICE_KIND_OPTED_OUT, "corpus")
    assert not catalogue.may_state("UO", run_pb2.NOTICE_KIND_OPTED_OUT, "corpus")


def test_an_unknown_expert_is_not_found(catalogue: Catalogue) -> None:
    assert catalogue.get("code-2").run == "run-2"
    with pytest.raises(NotFound, match="connito library list"):
        catalogue.get("code-9")
