"""What a customer derives from a platform's experts joins them only where its record follows from theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from connito.errors import Invalid
from connito.library.artifact import ExpertHeader
from connito.library.derived import derived_record
from connito.library.governance import Use, check_use, terms_of
from connito.library.membership import check_member, claimed
from connito.library.schema import Contributor, ExpertRecord, Governance
from connito.library.signature import encode_signature
from typing_extensions import Unpack

from tests.support.library import expert_record

ME = "UME"


def parent(name: str, licence: str = "CC0-1.0", **rules: Unpack[Governance]) -> ExpertRecord:
    record = expert_record(name, name)
    miner: Contributor = {"miner": f"U{name}", "label": name, "reward": 7, "merged": 1, "share": 1.0, "reasons": {}}
    governance: Governance = {"visibility": "public", "owner": f"U{name}", "sources": [f"text-{name}"]}
    return {
        **record,
        "license": licence,
        "expert": {**record["expert"], "digest": name * 16},
        "contributors": [miner],
        "governance": {**governance, **rules},
        "signature": encode_signature({2: [1.0, 2.0]}, {2: 5}),
    }


def composed(*parents: ExpertRecord) -> ExpertRecord:
    header = ExpertHeader("law+math", "smol", "b" * 64, {2: [1]}, "", 0)
    made = derived_record(
        "compose", header, [(record, 0.5) for record in parents], digest="d" * 64, size=10, parameters=3,
        created="2031-01-01T00:00:00.000+00:00", license=check_use(parents, Use("compose")).license, settings={},
    )  # fmt: skip
    return claimed(made, ME)


@pytest.fixture
def two() -> list[ExpertRecord]:
    return [parent("law"), parent("math", "CC-BY-4.0")]


def test_what_follows_from_its_parents_is_a_member(two: list[ExpertRecord]) -> None:
    record = composed(*two)
    check_member(record, two, ME)
    assert record["customer"] == ME
    assert record["license"] == "CC-BY-4.0 AND CC0-1.0"
    assert [row["share"] for row in record["contributors"]] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("contributors", lambda r: r["contributors"][0].update(share=1.0)),
        ("contributors", lambda r: r["contributors"].pop()),
        ("owner", lambda r: r.update(customer="UX")),
        ("owner", lambda r: r["governance"].update(owner="UX")),
        ("data sources", lambda r: r["governance"].update(sources=["text-law"])),
        ("licence", lambda r: r.update(license="CC0-1.0")),
        ("base", lambda r: r["base"].update(manifest="c" * 64)),
        ("parents", lambda r: r["derived"]["parents"][0].update(digest="0" * 64)),
        ("id", lambda r: r.update(expert_id="law-best")),
        ("run", lambda r: r.update(run="run-1")),
        ("routing signature", lambda r: r.update(signature=encode_signature({2: [9.0, 9.0]}, {2: 5}))),
    ],
)  # fmt: skip
def test_what_does_not_follow_is_named(two: list[ExpertRecord], what: str, change: Any) -> None:
    record = copy.deepcopy(composed(*two))
    change(record)
    with pytest.raises(Invalid, match=what):
        check_member(record, two, ME)


def test_nothing_made_of_what_is_private_is_public() -> None:
    parents = [parent("law", visibility="private", owner=ME), parent("math")]
    record = claimed(composed(parents[1]), ME)
    private = derived(parents)
    check_member(private, parents, ME)
    private["governance"]["visibility"] = "public"
    with pytest.raises(Invalid, match="visibility"):
        check_member(private, parents, ME)
    assert record["governance"]["visibility"] == "public"


def derived(parents: list[ExpertRecord]) -> ExpertRecord:
    header = ExpertHeader("law+math", "smol", "b" * 64, {2: [1]}, "", 0)
    made = derived_record(
        "upgrade", header, [(record, 1.0) for record in parents], digest="d" * 64, size=10, parameters=3,
        created="2031-01-01T00:00:00.000+00:00", license="CC0-1.0", settings={},
    )  # fmt: skip
    return claimed(made, ME)


def test_an_expert_of_a_run_is_no_member_by_hand() -> None:
    with pytest.raises(Invalid, match="a run brings"):
        check_member(parent("law"), [], ME)


def test_licences_that_hold_together_have_joint_terms() -> None:
    both = terms_of("CC-BY-NC-4.0 AND CC-BY-SA-4.0")
    assert both is not None
    assert (both.commercial, both.share_alike, both.derivatives) == (False, True, True)
    assert terms_of("CC0-1.0 AND nobody's") is None
    again = check_use([{**parent("law"), "license": "CC-BY-4.0 AND CC0-1.0"}, parent("math")], Use("compose"))
    assert again.license == "CC-BY-4.0 AND CC0-1.0"
