from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.models import full, one_thread, random_base, sequences, tiny

__all__ = ["full", "one_thread", "random_base", "sequences", "tiny"]


@pytest.fixture
def threads() -> Iterator[int]:
    """Threads to compute with, whatever this machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)
