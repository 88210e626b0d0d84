from __future__ import annotations

import pytest
from connito.jobs.pages import markdown, verdict
from connito.jobs.quote import cycles_until


@pytest.mark.parametrize(
    ("wanted", "first", "ratio", "cycles"),
    [(0.5, 0.1, 1.0, 5), (0.5, 0.5, 0.5, 1), (0.7, 0.4, 0.5, 3), (0.8, 0.4, 0.5, None), (0.01, 0.4, 0.5, 1)],
)
def test_cycles_until_the_objective(wanted: float, first: float, ratio: float, cycles: int | None) -> None:
    found = cycles_until(wanted, first, ratio)

    assert found == cycles
    if found is not None and ratio < 1:
        assert sum(first * ratio**n for n in range(found)) >= wanted
        assert sum(first * ratio**n for n in range(found - 1)) < wanted


def test_a_change_is_told_from_chance_or_not() -> None:
    assert verdict({"low": -0.2, "high": -0.1}) == "better"
    assert verdict({"low": 0.1, "high": 0.2}) == "worse"
    assert "no difference" in verdict({"low": -0.1, "high": 0.1})


def test_a_run_without_an_expert_says_so() -> None:
    same = {
        "name": "law",
        "use": "target",
        "before": 5.0,
        "after": 5.0,
        "change": -0.0,
        "low": -1e-9,
        "high": 0.0,
        "sequences": 8,
        "tokens": 1024,
    }
    page = markdown(
        {
            "run": "r",
            "domain": "law",
            "base": {"name": "tiny", "manifest": "m"},
            "expert": None,
            "measured": {"rows": [same], "apart": None, "confidence": 0.95, "right": []},
            "outcome": {"status": "no-improvement", "reason": "no-improvement", "detail": "nobody's work was of use"},
            "shelf": "for this text the shelf has x",
            "coverage": {"read": 10, "there": 100, "share": 0.1},
            "cycles": [],
            "selection": None,
            "contributors": [],
            "commands": {"audit": "connito audit r"},
            "start": None,
            "totals": {"upload_bytes_per_miner_and_cycle": 0},
        }
    )

    assert "No expert came out of it" in page
    assert "load_expert" not in page
    assert "For this text the shelf has x." in page
    assert "| +0.0000 | +0.0000 to +0.0000 |" in page
    assert "connito audit r" in page
