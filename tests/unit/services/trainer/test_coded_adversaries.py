"""Adversaries in a run of coded submissions: each is still refused for the rule that it breaks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from connito.data.tensors import read_header
from connito.errors import Invalid
from connito.moe.state import load_state, save_state
from connito.protocol.coding import decoded
from connito.protocol.submission import validate
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import TrainPolicy

from services.trainer.feedback import code
from services.trainer.strategy import Work
from tests.support.run import ME, RUN, Run
from tests.unit.services.trainer.test_adversary import strategy, victim, work

__all__ = ["victim", "work"]

POLICY = TrainPolicy(local_steps=10, learning_rate=1e-3, codec="ternary")


@pytest.fixture
def coded(story: Run) -> Run:
    story.facts.require_spec().training.CopyFrom(POLICY)
    return story


async def handed_in(name: str, work: Work, run: Run, victim: Path | None = None) -> Path:
    """What the committer gets of an adversary, decoded."""
    task = replace(work, policy=POLICY)
    await strategy(name, victim).produce(task)
    file = code(run.facts, ME, 1, task.state, task.draft, task.draft.parent / "left")
    there = decoded(file, task.state, POLICY, task.draft.parent)
    validate(there, read_header(task.state), task.state, 0.5)
    return there


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nan", reasons_pb2.REASON_NON_FINITE), ("large-norm", reasons_pb2.REASON_NORM_EXCEEDED)],
)
async def test_each_is_refused_for_its_own_reason(
    name: str, reason: reasons_pb2.Reason.ValueType, work: Work, coded: Run
) -> None:
    with pytest.raises(Invalid) as error:
        await handed_in(name, work, coded)
    assert error.value.reason == reason


async def test_rows_with_ballast_are_no_code(work: Work, coded: Run) -> None:
    with pytest.raises(Invalid, match="not a coded pseudo-gradient"):
        await handed_in("oversized", work, coded)
    assert work.draft.stat().st_size > work.state.stat().st_size + (1 << 20), "the size window comes first"


async def test_the_free_rider_changes_nothing(work: Work, coded: Run) -> None:
    there, state = load_state(await handed_in("freerider", work, coded)), load_state(work.state)
    assert all(there[name].equal(rows) for name, rows in state.items())


@pytest.mark.parametrize("name", ["copier", "noisy-copier", "scaled-copier"])
async def test_copiers_read_what_their_victim_coded(name: str, work: Work, coded: Run, victim: Path) -> None:
    stolen, state = victim / RUN / "1" / "artifact.safetensors", load_state(work.state)
    draws = torch.Generator().manual_seed(3)
    trained = {tensor: rows + 0.01 * torch.randn(rows.shape, generator=draws) for tensor, rows in state.items()}
    save_state(trained, stolen)
    code(coded.facts, ME, 1, work.state, stolen, victim / "left").replace(stolen)
    theirs = load_state(decoded(stolen, work.state, POLICY, victim))
    there = load_state(await handed_in(name, work, coded, victim))
    for tensor, rows in state.items():
        one, other = ((found[tensor] - rows).flatten() for found in (theirs, there))
        assert float(one @ other / (one.norm() * other.norm())) > 0.99
