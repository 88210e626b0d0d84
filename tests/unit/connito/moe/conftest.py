from __future__ import annotations

from tests.support.models import full, one_thread, random_base, sequences, tiny

__all__ = ["full", "one_thread", "random_base", "sequences", "tiny"]
