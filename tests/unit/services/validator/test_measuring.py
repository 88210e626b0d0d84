"""What can be said of states without a model."""

from __future__ import annotations

import numpy as np
import torch
from connito.v1.cycle_pb2 import Submission
from connito.workloads.scoring import rebase

from services.validator.actions import shared_name
from tests.support.run import ref, theta


def test_late_work_is_put_on_the_state_that_stands_now() -> None:
    origin = {"layers.0.down_proj": torch.tensor([[1.0, 2.0]])}
    artifact = {"layers.0.down_proj": torch.tensor([[1.5, 1.0]])}
    current = {"layers.0.down_proj": torch.tensor([[10.0, 20.0]])}
    got = rebase(artifact, origin, current, {})
    assert got["layers.0.down_proj"].tolist() == [[10.5, 19.0]]
    assert rebase(artifact, origin, origin, {})["layers.0.down_proj"].equal(artifact["layers.0.down_proj"])


def test_each_expert_counts_by_its_strength() -> None:
    origin = {"layers.3.down_proj": torch.zeros(3, 1, 2), "layers.4.up_proj": torch.zeros(1, 1)}
    artifact = {"layers.3.down_proj": torch.ones(3, 1, 2), "layers.4.up_proj": torch.ones(1, 1)}
    got = rebase(artifact, origin, origin, {3: np.array([1.0, 0.25, 0.0])})
    assert got["layers.3.down_proj"][:, 0, 0].tolist() == [1.0, 0.25, 0.0]
    assert got["layers.4.up_proj"].item() == 1.0


def test_the_dtype_of_the_standing_state_is_kept() -> None:
    half = {"layers.0.down_proj": torch.ones(1, 2, dtype=torch.bfloat16)}
    assert rebase(half, half, half, {})["layers.0.down_proj"].dtype is torch.bfloat16


def test_the_same_bytes_on_another_state_share_no_losses() -> None:
    first, second = (Submission(artifact=ref("aa"), base_state=theta(version)) for version in (1, 2))
    names = [shared_name(first, theta(1)), shared_name(second, theta(2)), shared_name(first, theta(2))]
    assert len(set(names)) == 3
    assert shared_name(Submission(artifact=ref("aa")), theta(1)) == names[0]
