from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from connito.protocol.scoring.consensus import clipped, consensus
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2
from hypothesis import given
from hypothesis import strategies as st


def report(
    validator: str, scores: Mapping[str, float | tuple[reasons_pb2.Reason.ValueType, str]], **fields: Any
) -> cycle_pb2.ScoreReport:
    made = cycle_pb2.ScoreReport(run="r", cycle=1, validator=validator, **fields)
    for miner, value in scores.items():
        score = made.scores.add(miner=miner, artifact_digest=f"digest of {miner}")
        if isinstance(value, tuple):
            score.reason, score.detail = value
        else:
            score.utility = value
    return made


def submission(miner: str) -> cycle_pb2.Submission:
    return cycle_pb2.Submission(miner=miner, artifact=artifacts_pb2.ArtifactRef(digest=f"digest of {miner}"))


def test_honest_validators_agree() -> None:
    agreed = consensus([report(v, {"UA": 0.1, "UB": 0.2}) for v in ("V1", "V2", "V3")])
    assert agreed.utilities == {"UA": 0.1, "UB": 0.2}
    assert agreed.reasons == {}
    assert [(s.validator, s.reported, s.deviation) for s in agreed.standings] == [
        ("V1", True, 0.0),
        ("V2", True, 0.0),
        ("V3", True, 0.0),
    ]


def test_a_minority_is_clipped_both_ways_and_seen() -> None:
    agreed = consensus(
        [
            report("V1", {"UA": 0.1, "UB": 0.1}),
            report("V2", {"UA": 0.1, "UB": 0.1}),
            report("V3", {"UA": 9.0, "UB": (reasons_pb2.REASON_NON_FINITE, "lie")}),
        ]
    )
    assert agreed.utilities == {"UA": 0.1, "UB": 0.1}
    assert agreed.standings[2].deviation == pytest.approx(8.9)


def test_stake_counts_and_strangers_do_not() -> None:
    reports = [report("V1", {"UA": 0.5}), report("V2", {"UA": 0.1}), report("V3", {"UA": 0.1})]
    assert consensus(reports, {"V1": 10, "V2": 1, "V3": 1}).utilities == {"UA": 0.5}
    assert consensus(reports, {"V2": 1, "V3": 1}).utilities == {"UA": 0.1}
    assert consensus(reports, {}).utilities == {"UA": 0.0}


def test_the_majority_gives_the_reason() -> None:
    agreed = consensus(
        [
            report("V1", {"UA": (reasons_pb2.REASON_NOT_SIGNIFICANT, "from V1")}),
            report("V2", {"UA": (reasons_pb2.REASON_NOT_SIGNIFICANT, "from V2")}),
            report("V3", {"UA": (reasons_pb2.REASON_NON_FINITE, "from V3")}),
        ],
        {"V1": 1, "V2": 2, "V3": 2.5},
    )
    assert agreed.reasons == {"UA": (reasons_pb2.REASON_NOT_SIGNIFICANT, cycle_pb2.Finding(text="from V2"))}


def test_only_settled_submissions_count_and_every_one_is_answered() -> None:
    wrong = report("V1", {"UA": 0.3, "UGHOST": 0.9})
    wrong.scores[0].artifact_digest = "another file"
    agreed = consensus([wrong], submissions=[submission("UA"), submission("UB")], expected=["V1", "V2"])
    assert agreed.utilities == {"UA": 0.0, "UB": 0.0}
    assert {reason for reason, _ in agreed.reasons.values()} == {reasons_pb2.REASON_NO_QUORUM}
    assert [(s.validator, s.reported) for s in agreed.standings] == [("V1", True), ("V2", False)]


def test_reports_on_another_seed_or_state_do_not_count() -> None:
    reports = [
        report("V1", {"UA": 0.1}, seed=b"s", state_digest="d"),
        report("V2", {"UA": 0.9}, seed=b"t", state_digest="d"),
        report("V3", {"UA": 0.9}, seed=b"s", state_digest="e"),
    ]
    agreed = consensus(reports, seed=b"s", state_digest="d", expected=["V1", "V2", "V3"])
    assert agreed.utilities == {"UA": 0.1}
    assert [s.reported for s in agreed.standings] == [True, False, False]


@pytest.mark.parametrize("utility", [math.nan, math.inf, -1.0])
def test_utilities_that_are_no_utilities_are_zero(utility: float) -> None:
    assert consensus([report("V1", {"UA": utility})]).utilities == {"UA": 0.0}


def test_nobody_reported() -> None:
    agreed = consensus([], submissions=[submission("UA")])
    assert agreed.utilities == {"UA": 0.0}


@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=9),
    st.lists(st.floats(0, 1e6), min_size=1, max_size=8),
)
def test_less_than_half_of_the_stake_cannot_leave_the_range_of_the_others(
    honest: list[float], lies: list[float]
) -> None:
    lies = lies[: (len(honest) - 1)]
    claims = {f"h{i}": value for i, value in enumerate(honest)} | {f"l{i}": value for i, value in enumerate(lies)}
    level = clipped(claims, dict.fromkeys(claims, 1.0), 0.5)
    assert min(honest) <= level <= max(honest)
