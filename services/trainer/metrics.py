"""What the trainer measures. The metrics themselves are declared in the catalogue, `connito.runtime.metrics`."""

from __future__ import annotations

from connito.runtime.metrics import REFUSALS, TRAIN_STEP_SECONDS, TRAIN_TOKENS, UPLOAD_BYTES

__all__ = ["REFUSALS", "TRAIN_STEP_SECONDS", "TRAIN_TOKENS", "UPLOAD_BYTES"]
