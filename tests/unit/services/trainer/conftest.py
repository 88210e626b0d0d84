"""A run in which the miner is enrolled and the experts are selected."""

from __future__ import annotations

import pytest

from tests.support.models import random_base
from tests.support.run import ME, Run

__all__ = ["random_base", "story"]


@pytest.fixture
def story() -> Run:
    return Run().created().selected().miners(ME)
