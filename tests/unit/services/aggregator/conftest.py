from __future__ import annotations

from tests.support.stage import ready, stage

__all__ = ["ready", "stage"]
