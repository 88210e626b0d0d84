from __future__ import annotations

from tests.support.models import full, one_thread, sequences, tiny
from tests.support.parts import base, parts

__all__ = ["base", "full", "one_thread", "parts", "sequences", "tiny"]
