"""What the validator measures. The metrics themselves are declared in the catalogue, `connito.runtime.metrics`."""

from __future__ import annotations

from connito.runtime.metrics import SCORE_SECONDS, SECURITY_EVENTS, SUBMISSIONS

__all__ = ["SCORE_SECONDS", "SECURITY_EVENTS", "SUBMISSIONS"]
