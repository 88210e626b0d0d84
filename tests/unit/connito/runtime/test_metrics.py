from __future__ import annotations

import re

import pytest
from connito.runtime import metrics
from connito.runtime.metrics import Metric
from prometheus_client import Counter, Histogram, generate_latest


@pytest.mark.parametrize("metric", metrics.CATALOGUE.values(), ids=lambda metric: metric.name)
def test_each_has_a_good_name_a_meaning_and_a_remedy(metric: Metric) -> None:
    assert re.fullmatch(r"connito_[a-z0-9_]+", metric.name)
    assert len(metric.help) > 10
    assert len(metric.when_bad) > 10
    assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_what_is_measured_is_exported() -> None:
    metrics.REFUSALS.labels("late-reveal").inc()
    text = generate_latest().decode()
    assert 'connito_refusals_total{reason="late-reveal"}' in text
    assert "# HELP connito_bus_connected 1 while the broker connection stands" in text


def test_a_name_is_declared_once() -> None:
    with pytest.raises(AssertionError, match="declared twice"):
        metrics.declare(Counter, "refusals_total", "again", when_bad="never")


def test_a_histogram_reaches_from_milliseconds_to_minutes() -> None:
    assert isinstance(metrics.PUBLISH_SECONDS, Histogram)
    assert metrics.SECONDS[0] <= 0.001
    assert metrics.SECONDS[-1] >= 600
