"""Muon against torch's own, against singular values, and in training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from connito.moe.adamw import AdamW
from connito.moe.moments import Moments
from connito.moe.muon import ITERATIONS, MOMENTUM, NEWTON_SCHULZ, Muon, orthogonal
from connito.moe.resident import compress, target_parameters, write_targets
from connito.moe.training import train_local

BETAS, DECAY, RATE, STEPS = (0.9, 0.95), 0.05, 1e-2, 6


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [(1e-3 * torch.randn(shape, generator=draw)).to(dtype) for _ in range(STEPS)]


def start(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


@pytest.mark.parametrize("shape", [(3, 16, 48), (2, 48, 16), (3, 5, 7)])
@pytest.mark.parametrize(("dtype", "compact"), [(torch.float32, False), (torch.bfloat16, True)])
def test_an_experts_step_is_its_share_of_torchs_own(shape: tuple[int, ...], dtype: torch.dtype, compact: bool) -> None:
    bank = torch.nn.Parameter(start(shape, dtype))
    ours = Muon({"bank": bank}, betas=BETAS, weight_decay=DECAY, compact=compact)
    matrices = [torch.nn.Parameter(matrix.float()) for matrix in start(shape, dtype)]
    theirs = torch.optim.Muon(
        [{"params": [matrix]} for matrix in matrices], momentum=MOMENTUM, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    # The expert whose gradient is longest takes the whole step, others less of it.
    sizes = torch.tensor([0.25, 1.0, 0.6][: shape[0]])
    for gradient in gradients(shape, dtype):
        bank.grad = gradient * sizes[:, None, None].to(dtype)
        norms = bank.grad.float().flatten(1).norm(dim=1)
        for matrix, own, share, group in zip(
            matrices, bank.grad, (norms / norms.max()).tolist(), theirs.param_groups, strict=True
        ):
            matrix.grad = own.float()
            group |= {"lr": RATE * share, "weight_decay": DECAY / share}
        ours.step(RATE)
        theirs.step()  # type: ignore[no-untyped-call]
        assert bank.grad is None
    found, wanted = bank.detach().float(), torch.stack([matrix.detach() for matrix in matrices])
    moved = (wanted - start(shape, dtype).float()).norm()
    # Theirs iterates in bfloat16.
    assert (found - wanted).norm() < (0.05 if compact else 0.02) * moved


def test_singular_values_become_alike_and_directions_stay() -> None:
    given = torch.randn(4, 24, 40, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(given))
    assert values.min() > 0.6
    assert values.max() < 1.3
    # U f(Σ) Vᵀ: with the singular vectors of what was given it is diagonal.
    u, _, v = torch.linalg.svd(given, full_matrices=False)
    turned = u.mT @ orthogonal(given) @ v.mT
    assert torch.allclose(turned, torch.diag_embed(torch.diagonal(turned, dim1=-2, dim2=-1)), atol=1e-3)
    assert not orthogonal(torch.zeros(1, 3, 5)).any()


@pytest.mark.parametrize("rank", [1, 8, 24])
@pytest.mark.parametrize("shape", [(24, 40), (96, 24), (24, 24)])
def test_it_is_the_iteration_of_the_whole_matrix(rank: int, shape: tuple[int, int]) -> None:
    """Few tokens make a gradient of few directions, whose other singular values are rounding."""
    draw = torch.Generator().manual_seed(rank)
    given = torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw) * 1e-5
    whole = given.double() / given.double().norm()
    for _ in range(ITERATIONS):
        gram = whole @ whole.mT
        whole = sum(
            factor * part
            for factor, part in zip(NEWTON_SCHULZ, (whole, gram @ whole, gram @ gram @ whole), strict=True)
        )
    assert (orthogonal(given[None])[0] - whole).norm() < 1e-3 * whole.norm()


def test_vectors_take_adamws_step() -> None:
    found, wanted = (torch.nn.Parameter(start((3, 8), torch.float32)) for _ in range(2))
    ours, theirs = Muon({"a": found}, betas=BETAS), AdamW({"a": wanted}, betas=BETAS)
    for gradient in gradients((3, 8), torch.float32):
        found.grad, wanted.grad = gradient.clone(), gradient.clone()
        ours.step(RATE, torch.tensor(0.5))
        theirs.step(RATE, torch.tensor(0.5))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(3, 16, 48), (3, 5, 7)])
@pytest.mark.parametrize("compact", [True, False])
def test_an_expert_without_tokens_stays_where_it_is(shape: tuple[int, ...], compact: bool) -> None:
    """Its momentum fades, but a step is as long whatever is left of it."""
    bank = torch.nn.Parameter(start(shape, torch.float32))
    ours = Muon({"bank": bank}, betas=BETAS, compact=compact)
    first, *later = gradients(shape, torch.float32)
    bank.grad = first
    ours.step(RATE)
    before = bank.detach().clone()
    for gradient in later:
        gradient[1] = 0
        bank.grad = gradient
        ours.step(RATE)
    assert torch.equal(bank[1], before[1])
    assert all((bank[index] != before[index]).any() for index in (0, 2))


@pytest.mark.parametrize(("compact", "bytes_a_value"), [(True, 1 + 4 / 256), (False, 4)])
def test_it_keeps_half_of_what_adamw_keeps(compact: bool, bytes_a_value: float) -> None:
    bank = torch.nn.Parameter(start((2, 16, 32), torch.float32))
    ours = Muon({"bank": bank}, betas=BETAS, compact=compact)
    bank.grad = torch.ones_like(bank)
    ours.step(RATE)
    assert ours.bytes() == bank.numel() * bytes_a_value


def test_local_steps_lower_the_loss_and_begin_without_momentum(trained: Any) -> None:
    model, batches = trained
    before = {name: row.detach().clone() for name, row in target_parameters(model).items()}
    kept = Moments()
    first, stats = train_local(model, batches, learning_rate=2e-2, inner="muon", betas=BETAS, moments=kept)
    assert stats.last_loss < stats.first_loss
    assert all((row != before[name]).any() for name, row in target_parameters(model).items())
    assert kept.steps == 0
    write_targets(model, before)
    again, _ = train_local(model, batches, learning_rate=2e-2, inner="muon", betas=BETAS, moments=kept)
    assert all(torch.equal(again[name], rows) for name, rows in first.items())


@pytest.fixture
def trained(request: pytest.FixtureRequest) -> Any:
    base, selection = request.getfixturevalue("random_base"), {1: [0], 2: [3]}
    from connito.base.loading import load_full

    rng = np.random.default_rng(0)
    batches = np.tile(rng.integers(0, 64, (1, 2, 33), dtype=np.int32), (12, 1, 1))
    return compress(load_full(base), selection, {1: [1], 2: [2]}), batches
