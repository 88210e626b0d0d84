"""Names that the platform gives to runs."""

from __future__ import annotations

import re

import pytest
from connito.jobs.submit import _run_id
from connito.wire.subjects import check_token


@pytest.mark.parametrize("domain", ["law", "x" * 80])
def test_a_private_run_has_a_name_that_nobody_guesses(domain: str) -> None:
    names = {_run_id(domain, guessable=False) for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r".+-\d{8}-\d{6}-[0-9a-f]{12}", check_token(name, "run")) for name in names)
    assert re.fullmatch(r".+-\d{8}-\d{6}", check_token(_run_id(domain, guessable=True), "run"))
