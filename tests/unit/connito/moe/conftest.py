from __future__ import annotations

from tests.support.models import full, one_thread, sequences, tiny

__all__ = ["full", "one_thread", "sequences", "tiny"]
