"""A run in which the miner is enrolled and the experts are selected."""

from __future__ import annotations

import pytest

from tests.unit.services.trainer.story import Story


@pytest.fixture
def story() -> Story:
    return Story().created().selected().enrolled()
