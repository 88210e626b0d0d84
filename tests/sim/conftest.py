"""Simulated services say nothing: what they would have said is asked for by seed (`python -m bench.simulate --say`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # A process that is killed leaves coroutines that nobody awaits; they are collected in the midst of some later run.
    unawaited = pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(unawaited)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    configured = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    yield
    structlog.configure(**configured)
