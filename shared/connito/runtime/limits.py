"""Rate limits per key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from connito.errors import Invalid
from connito.v1 import reasons_pb2

MAX_KEYS = 10_000


@dataclass
class RateLimit:
    """A token bucket per key: `burst` requests at once, `per_second` in the long run. `clock` gives seconds."""

    per_second: float
    burst: float
    clock: Callable[[], float]
    _buckets: dict[str, tuple[float, float]] = field(default_factory=dict)

    def take(self, key: str, cost: float = 1.0) -> None:
        """Count one request. Raises `Invalid` (QUOTA_EXCEEDED) saying when to come back."""
        now = self.clock()
        tokens, then = self._buckets.pop(key, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.per_second)
        if len(self._buckets) >= MAX_KEYS:
            # The key that was silent longest has a full bucket by now, or is one of very many.
            self._buckets.pop(next(iter(self._buckets)))
        if tokens < cost:
            self._buckets[key] = (tokens, now)
            wait = (cost - tokens) / self.per_second
            raise Invalid(
                f"too many requests; try again in {wait:.1f} s", reason=reasons_pb2.REASON_QUOTA_EXCEEDED, after=wait
            )
        self._buckets[key] = (tokens - cost, now)
