"""Each adversary breaks the one rule that it claims to break, and no other."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.errors import Fatal, Invalid, Retry
from connito.moe.state import load_state, save_state
from connito.protocol.policy.choices import ADVERSARIES
from connito.protocol.submission import expected_layout, validate
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import TrainPolicy
from connito.wire.locked import lock_file

from services.trainer.adversary import Copier, MixedCopier, choose
from services.trainer.handlers import Commit, LogDecision, ReportTrained, Reveal, Train, decide
from services.trainer.settings import TrainerSettings
from services.trainer.state import CycleProgress, Ledger
from services.trainer.strategy import HONEST, Effort, Strategy, Work
from tests.support.run import ME, RUN, Run

VICTIM = "UVICTIM"
POLICY = TrainPolicy(local_steps=10, learning_rate=1e-3)
HONEST_DELTA = 0.01


def strategy(name: str, victim: Path | None = None) -> Strategy:
    return choose(settings_of(trainer_adversary=name, trainer_victim_dir=victim))


def settings_of(**given: Any) -> TrainerSettings:
    return TrainerSettings(key_file=Path("k"), **given)


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """θ_t on disk, and honest training that adds a constant."""
    state = tmp_path / "state.safetensors"
    generator = torch.Generator().manual_seed(1)
    theta = {
        "layers.3.down_proj": torch.randn(2, 8, 6, generator=generator),
        "layers.3.gate_up_proj": torch.randn(2, 6, 16, generator=generator),
    }
    save_state(theta, state)
    draft = tmp_path / "draft.safetensors"

    async def train() -> Effort:
        save_state({name: tensor + HONEST_DELTA for name, tensor in theta.items()}, draft)
        return Effort(10, 100, 1.0)

    return Work(RUN, 1, ME, state, draft, POLICY, train)


@pytest.fixture
def victim(tmp_path: Path, work: Work) -> Path:
    """The work folder of a miner that trained honestly in cycle 1."""
    folder = tmp_path / "victim"
    ledger = Ledger(folder, VICTIM)
    result = {name: tensor + HONEST_DELTA for name, tensor in load_state(work.state).items()}
    save_state(result, ledger.folder(RUN, 1) / "draft")
    ledger.keep_artifact(RUN, 1, ledger.folder(RUN, 1) / "draft")
    ledger.update(RUN, 1, artifact="ab" * 32, size=(ledger.artifact_path(RUN, 1)).stat().st_size)
    ledger.close()
    return folder


def delta(work: Work) -> dict[str, torch.Tensor]:
    start, end = load_state(work.state), load_state(work.draft)
    return {name: end[name] - start[name] for name in start}


def why_refused(work: Work) -> reasons_pb2.Reason.ValueType:
    with pytest.raises(Invalid) as caught:
        validate(work.draft, expected_layout(work.state), work.state, 0.5)
    return caught.value.reason


def test_nobody_misbehaves_by_default() -> None:
    assert strategy("") is HONEST


@pytest.mark.parametrize("name", ["copier", "noisy-copier", "masked-copier", "scaled-copier", "mixed-copier"])
def test_copiers_need_a_victim(name: str) -> None:
    with pytest.raises(Fatal, match="CONNITO_TRAINER_VICTIM_DIR"):
        strategy(name)


def test_an_unknown_adversary_is_named_with_those_there_are() -> None:
    with pytest.raises(Fatal, match=", ".join(ADVERSARIES)):
        strategy("saboteur")


@pytest.mark.parametrize("name", ADVERSARIES)
def test_every_adversary_that_can_be_asked_for_exists(name: str) -> None:
    assert strategy(name, Path("victim")).name == name


async def test_the_free_rider_hands_in_the_very_state(work: Work) -> None:
    await strategy("freerider").produce(work)
    assert work.draft.read_bytes() == work.state.read_bytes()


async def test_noise_has_the_size_of_an_honest_delta_and_is_well_formed(work: Work) -> None:
    await strategy("noise").produce(work)
    for tensor in delta(work).values():
        assert float(tensor.norm()) / math.sqrt(tensor.numel()) == pytest.approx(1e-3 * 10 / 2, rel=1e-3)
    validate(work.draft, expected_layout(work.state), work.state, 0.5)


async def test_the_copier_has_its_victims_bytes(work: Work, victim: Path) -> None:
    await strategy("copier", victim).produce(work)
    assert work.draft.read_bytes() == (victim / RUN / "1" / "artifact.safetensors").read_bytes()


async def test_the_copier_takes_the_key_with_the_locked_result(work: Work, victim: Path) -> None:
    path = victim / RUN / "1" / "artifact.safetensors"
    rows, locked = path.read_bytes(), victim / "locked"
    content = hashlib.sha256(rows).hexdigest()
    lock_file(path, locked, b"k" * 32, content)
    locked.replace(path)
    ledger = Ledger(victim, VICTIM)
    size, key = path.stat().st_size, (b"k" * 32).hex()
    ledger.update(RUN, 1, artifact="ab" * 32, size=size, key=key, content=content)
    ledger.close()
    await strategy("copier", victim).produce(work)
    assert work.draft.read_bytes() == rows


async def test_the_noisy_copier_differs_by_one_percent_of_the_delta(work: Work, victim: Path) -> None:
    await strategy("noisy-copier", victim).produce(work)
    stolen = load_state(victim / RUN / "1" / "artifact.safetensors")
    for name, tensor in load_state(work.draft).items():
        honest = HONEST_DELTA * math.sqrt(tensor.numel())
        assert float((tensor - stolen[name]).norm()) / honest == pytest.approx(0.01, rel=0.02)
        cosine = torch.cosine_similarity(delta(work)[name].flatten(), torch.ones(tensor.numel()), dim=0)
        assert float(cosine) > 0.999


async def test_the_masked_copier_is_not_alike_by_direction(work: Work, victim: Path) -> None:
    await strategy("masked-copier", victim).produce(work)
    for tensor in delta(work).values():
        cosine = torch.cosine_similarity(tensor.flatten(), torch.ones(tensor.numel()), dim=0)
        assert 0.4 < float(cosine) < 0.95


async def test_the_scaled_copier_goes_further_the_same_way(work: Work, victim: Path) -> None:
    await strategy("scaled-copier", victim).produce(work)
    for tensor in delta(work).values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 1.5 * HONEST_DELTA), rtol=1e-4, atol=1e-6)


async def test_the_mixed_copier_is_half_of_each(work: Work, victim: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    ledger = Ledger(second, "UOTHER")
    save_state(load_state(work.state), ledger.folder(RUN, 1) / "draft")
    ledger.keep_artifact(RUN, 1, ledger.folder(RUN, 1) / "draft")
    ledger.update(RUN, 1, artifact="cd" * 32, size=1)
    ledger.close()
    settings = settings_of(
        trainer_adversary="mixed-copier",
        trainer_victim_dir=victim,
        trainer_second_victim_dir=second,
    )
    await choose(settings).produce(work)
    for tensor in delta(work).values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, HONEST_DELTA / 2), rtol=1e-4, atol=1e-6)


def test_the_mixed_copier_waits_for_both_of_its_victims(story: Run, victim: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    Ledger(second, "UOTHER").close()
    player = MixedCopier(victim, second)
    story.opened("train").closed("train").opened("commit").committed(VICTIM, digest=bytes.fromhex("ab" * 32))
    assert not player.may_produce(story.facts, 1)
    story.committed("UOTHER", digest=bytes.fromhex("cd" * 32))
    assert player.may_produce(story.facts, 1)


async def test_the_sign_flip_is_the_opposite_of_honest_work(work: Work) -> None:
    effort = await strategy("sign-flip").produce(work)
    assert effort.steps == 10
    for tensor in delta(work).values():
        torch.testing.assert_close(tensor, torch.full_like(tensor, -HONEST_DELTA), rtol=1e-4, atol=1e-6)


async def test_the_large_norm_is_refused_for_it(work: Work) -> None:
    await strategy("large-norm").produce(work)
    assert why_refused(work) == reasons_pb2.REASON_NORM_EXCEEDED


async def test_a_copier_waits_for_a_result_to_steal(work: Work, tmp_path: Path) -> None:
    with pytest.raises(Retry):
        await strategy("copier", tmp_path / "nobody").produce(work)


async def test_nan_is_refused_as_non_finite(work: Work) -> None:
    await strategy("nan").produce(work)
    assert why_refused(work) == reasons_pb2.REASON_NON_FINITE


async def test_oversized_is_over_the_cap_and_reveals_in_spite_of_the_refusal(work: Work) -> None:
    player = strategy("oversized")
    await player.produce(work)
    assert work.draft.stat().st_size > 2 * work.state.stat().st_size
    assert why_refused(work) == reasons_pb2.REASON_OVERSIZED
    assert player.reveals_after(Invalid("no slot"))
    assert not HONEST.reveals_after(Invalid("no slot"))


def steps(story: Run, player: Strategy, *progress: CycleProgress) -> list[object]:
    decision = decide(story.facts, ME, {item.cycle: item for item in progress}, player)
    return [action.payload for action in decision.actions if not isinstance(action.payload, LogDecision)]


def test_the_copier_lies_about_training_then_takes_what_its_victim_committed_to(story: Run, victim: Path) -> None:
    player = Copier(victim)
    story.opened("train")
    assert steps(story, player) == [ReportTrained(1)]
    said = CycleProgress(1, ME, said=True)
    story.closed("train").opened("commit")
    assert steps(story, player, said) == []
    story.committed(VICTIM, digest=bytes.fromhex("ab" * 32))
    assert steps(story, player, said) == [Train(1)]
    assert steps(story, player, replace(said, artifact="ab" * 32, commitment="cd" * 32)) == [Commit(1)]


def test_the_late_one_reveals_only_after_the_close(story: Run) -> None:
    mine = CycleProgress(1, ME, artifact="ab" * 32, commitment="cd" * 32, said=True, committed=True)
    story.opened("train").closed("train").opened("commit").committed(ME, digest=bytes.fromhex("cd" * 32)).closed(
        "commit"
    )
    story.settled("commit", committed=[ME]).opened("submit")
    assert steps(story, strategy("late"), mine) == []
    assert steps(story.closed("submit"), strategy("late"), mine) == [Reveal(1)]
