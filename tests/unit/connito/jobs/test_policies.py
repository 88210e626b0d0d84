"""A job runs with the platform's policies unless it says otherwise, and what the coordinator would refuse it hears first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from connito.jobs.check import Checked, check
from connito.jobs.spec import parse_job
from connito.protocol.policy.law import DEFAULTS


def checked(customer: Path, **fields: Any) -> Checked:
    job = {
        "domain": "code", "base": "base", "data": [{"path": "code.jsonl"}], "license": "PSF-2.0",
        "general": [{"domain": "prose", "path": "prose.jsonl"}], "data_statement": "Python.", **fields,
    }  # fmt: skip
    return check(parse_job(job), customer, customer / "no-platform")


def test_a_job_on_any_base_takes_the_platform_s_policies(customer: Path) -> None:
    spec = checked(customer).spec
    for policy in ("training", "scoring", "merging", "rewards"):
        assert getattr(spec, policy) == getattr(DEFAULTS, policy), policy
    assert spec.windows.ceiling_seconds == DEFAULTS.windows.ceiling_seconds


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"policies": {"scoring": {"confidence": 2.0}}}, "scoring.confidence is 2"),
        ({"policies": {"training": {"learning_rate": 50}}}, "training.learning_rate is 50"),
    ],
)
def test_what_the_coordinator_would_refuse_is_refused_by_the_check(
    customer: Path, fields: dict[str, Any], said: str
) -> None:
    found = checked(customer, **fields)
    assert not found.ok
    assert said in [row.detail for row in found.findings if row.level == "error"]
