"""What can be said of states without a model."""

from __future__ import annotations

import torch
from connito.workloads.scoring import rebase


def test_late_work_is_put_on_the_state_that_stands_now() -> None:
    origin = {"layers.0.down_proj": torch.tensor([[1.0, 2.0]])}
    artifact = {"layers.0.down_proj": torch.tensor([[1.5, 1.0]])}
    current = {"layers.0.down_proj": torch.tensor([[10.0, 20.0]])}
    got = rebase(artifact, origin, current)
    assert got["layers.0.down_proj"].tolist() == [[10.5, 19.0]]
    assert rebase(artifact, origin, origin)["layers.0.down_proj"].equal(artifact["layers.0.down_proj"])


def test_the_dtype_of_the_standing_state_is_kept() -> None:
    half = {"layers.0.down_proj": torch.ones(1, 2, dtype=torch.bfloat16)}
    assert rebase(half, half, half)["layers.0.down_proj"].dtype is torch.bfloat16
