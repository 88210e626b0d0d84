"""A start that cannot be is refused at the check, not minutes into the run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.jobs import check
from connito.jobs.context import JobContext
from connito.jobs.spec import parse_job
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.run_pb2 import ExpertDeposited, RunSpec

from tests.support.library import expert_record

SHELF = {
    "law-0123": ExpertDeposited(base_digest="mine"),
    "law-9999": ExpertDeposited(base_digest="other"),
    "law-prune-1": ExpertDeposited(base_digest="mine", files=[ArtifactRef(digest="a")]),
    "law-no": ExpertDeposited(base_digest="mine"),
    "law-bad": ExpertDeposited(base_digest="mine"),
    "law-gone": ExpertDeposited(base_digest="mine"),
}


def levels(start: str, *, reached: bool = True) -> list[tuple[str, str]]:
    job = parse_job({"domain": "law", "data": [{"path": "x"}], "license": "MIT", "start_from": start})
    licence = "CC-BY-ND-4.0" if start == "law-no" else "CC-BY-4.0 AND CC0-1.0"
    record = {**expert_record(start, "law"), "license": licence}
    if start == "law-gone":
        record["governance"] = {"sources": ["ward-notes"]}
    context = SimpleNamespace(
        session=SimpleNamespace(identity=SimpleNamespace(public="UME")) if reached else None,
        experts=SHELF,
        against={"law-bad": "yanked: a leak", "ward-notes": "the owner of a source of its data has opted out: a wish"},
        record_of=lambda name: record if name in SHELF else None,
        manifest=SimpleNamespace(digest="mine"),
    )
    found = check._start(job, RunSpec(license="MIT"), cast(JobContext, cast(Any, context)))
    return [(finding.level, f"{finding.detail}; {finding.remedy}") for finding in found]


@pytest.mark.parametrize("start", ["auto", "none"])
def test_words_of_their_own_need_no_expert(start: str) -> None:
    assert levels(start) == []


def test_an_expert_of_the_platform_and_the_base_is_fine() -> None:
    assert [level for level, _ in levels("law-0123")] == ["ok"]


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ("law-012", "did you mean law-0123"),
        ("law-9999", "is of another base (other"),
        ("law-prune-1", "a whole model"),
        ("law-no", "allows no derivatives"),
        ("law-bad", "yanked: a leak"),
        ("law-gone", "has opted out"),
    ],
)
def test_another_one_is_refused_with_the_remedy(start: str, said: str) -> None:
    ((level, text),) = levels(start)
    assert (level, said in text) == ("error", True)


def test_without_a_platform_nobody_can_tell() -> None:
    assert levels("law-7777", reached=False) == []
