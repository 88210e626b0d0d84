from __future__ import annotations

import pytest
from connito.errors import Invalid, NotFound
from connito.facts import Fact
from connito.subjects import FactKey
from connito.v1 import run_pb2

from services.library.projection import Catalogue


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


def test_pages_are_in_the_order_of_the_log_and_end(catalogue):
    seen, token = [], ""
    for _ in range(3):
        experts, token = catalogue.page(2, token)
        seen.append([expert.expert_id for expert in experts])

    assert seen == [["code-1", "code-2"], ["code-3", "code-4"], ["code-5"]]
    assert token == ""


def test_a_deposit_between_two_pages_shifts_nothing(catalogue):
    _, token = catalogue.page(4, "")
    catalogue.add(deposit(6))

    experts, _ = catalogue.page(4, token)

    assert [expert.expert_id for expert in experts] == ["code-5", "code-6"]


@pytest.mark.parametrize("token", ["x", "YWZ0ZXI6eA==", "ß"])
def test_a_foreign_page_token_is_refused(catalogue, token):
    with pytest.raises(Invalid, match="not a page token"):
        catalogue.page(2, token)


def test_an_unknown_expert_is_not_found(catalogue):
    assert catalogue.get("code-2").run == "run-2"
    with pytest.raises(NotFound, match="connito library list"):
        catalogue.get("code-9")
