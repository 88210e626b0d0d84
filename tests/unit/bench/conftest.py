from __future__ import annotations

from tests.support.models import one_thread

__all__ = ["one_thread"]
