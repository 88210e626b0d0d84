from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.support.models import Sequences, distinct_tiny, full, one_thread, sequences, tiny
from tests.support.parts import base, parts

__all__ = ["base", "distinct_tiny", "full", "one_thread", "parts", "sequences", "tiny"]


@pytest.fixture
def logits(sequences: Sequences) -> Callable[[Any], torch.Tensor]:
    """What a model says about two sequences, (2, length, vocabulary)."""
    ids = torch.from_numpy(sequences("recipes", 2, 60)[:, :-1].astype("int64"))

    def of(model: Any) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    return of
