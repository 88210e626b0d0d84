"""What the validator measures. The metrics themselves are declared in the catalogue, `connito.metrics`."""

from __future__ import annotations

from connito.metrics import SCORE_SECONDS, SECURITY_EVENTS, SUBMISSIONS

__all__ = ["SCORE_SECONDS", "SECURITY_EVENTS", "SUBMISSIONS"]
