"""What the trainer measures. The metrics themselves are declared in the catalogue, `connito.metrics`."""

from __future__ import annotations

from connito.metrics import REFUSALS, TRAIN_STEP_SECONDS, TRAIN_TOKENS, UPLOAD_BYTES

__all__ = ["REFUSALS", "TRAIN_STEP_SECONDS", "TRAIN_TOKENS", "UPLOAD_BYTES"]
