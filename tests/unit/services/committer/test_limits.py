"""The rate limit."""

from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.runtime import limits
from connito.runtime.limits import RateLimit
from connito.v1 import reasons_pb2


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_the_long_run_rate() -> None:
    clock = Clock()
    limit = RateLimit(per_second=2, burst=3, clock=clock)
    for _ in range(3):
        limit.take("a")
    with pytest.raises(Invalid, match=r"0\.5 s") as caught:
        limit.take("a")
    assert caught.value.reason == reasons_pb2.REASON_QUOTA_EXCEEDED
    limit.take("b")
    clock.now += 0.5
    limit.take("a")
    with pytest.raises(Invalid):
        limit.take("a")


def test_many_keys_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_KEYS", 10)
    limit = RateLimit(per_second=1, burst=1, clock=Clock())
    for index in range(100):
        limit.take(str(index))
    assert len(limit._buckets) == 10
