"""The optimiser against torch's own, and what it keeps in memory and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from connito.moe import adamw
from connito.moe.adamw import AdamW
from connito.moe.engine import OPTIMIZERS, is_compact
from connito.moe.moments import BLOCK, Moment, Moments

BETAS, DECAY, RATE = (0.9, 0.95), 0.05, 1e-3
SHAPES = {"a": (3, 37, 29), "b": (5,), "c": (2, BLOCK)}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of these tests take several chunks, the last of them not full."""
    monkeypatch.setitem(adamw.CHUNK, "cpu", 4 * BLOCK)


def values(seed: int, scale: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    # Gradients of several sizes within one block.
    return {
        name: (scale * torch.randn(shape, generator=draw) * torch.randn(shape, generator=draw).exp()).to(dtype)
        for name, shape in SHAPES.items()
    }


def torchs(steps: int, dtype: torch.dtype, clip: float = 0.0) -> dict[str, torch.Tensor]:
    """Return what torch.optim.AdamW makes of float32 copies; tensor c has a gradient in every other step."""
    parameters = {name: torch.nn.Parameter(v.float()) for name, v in values(0, 0.02, dtype).items()}
    optimiser = torch.optim.AdamW(parameters.values(), lr=RATE, betas=BETAS, weight_decay=DECAY, foreach=False)
    for step in range(steps):
        for name, gradient in values(1 + step, 1e-3, dtype).items():
            parameters[name].grad = None if name == "c" and step % 2 else gradient.float()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
        optimiser.step()
    return {name: p.detach() for name, p in parameters.items()}


def ours(
    steps: int, dtype: torch.dtype, *, compact: bool, clip: float = 0.0, start: Moments | None = None, skip: int = 0
) -> AdamW:
    parameters = {name: torch.nn.Parameter(v) for name, v in values(0, 0.02, dtype).items()}
    optimiser = AdamW(parameters, betas=BETAS, weight_decay=DECAY, compact=compact, start=start)
    for step in range(skip, skip + steps):
        for name, gradient in values(1 + step, 1e-3, dtype).items():
            parameters[name].grad = None if name == "c" and step % 2 else gradient
        scale = (clip / (optimiser.norm() + 1e-6)).clamp_(max=1.0) if clip else None
        optimiser.step(RATE, scale)
        assert all(p.grad is None for p in parameters.values()), "gradients are let go of"
    return optimiser


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_exact_steps_are_torchs_to_the_bit(clip: float) -> None:
    expected, got = torchs(7, torch.float32, clip), ours(7, torch.float32, compact=False, clip=clip)
    for name, parameter in got.parameters.items():
        if clip:
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_two_bytes_are_moved_as_float32_numbers(dtype: torch.dtype) -> None:
    """Both halves together are what float32 master copies would hold, after many steps that no bfloat16 resolves."""
    expected, got = torchs(40, dtype), ours(40, dtype, compact=False)
    for name, parameter in got.parameters.items():
        count = parameter.numel()
        assert torch.equal(got._value(name, 0, count).view(parameter.shape), expected[name])
        # Halves round up here, and to even there: the stored number is a nearest one either way.
        distance = (parameter.detach().float() - expected[name]).abs()
        assert torch.equal(distance, (expected[name].to(dtype).float() - expected[name]).abs())


def test_two_halves_hold_every_float32_number() -> None:
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-38, -1e-45, 3.0e38, -3.0e38, 1.00390625, -1.01171875, 65504.0])
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20_000,), generator=draw).to(torch.int32).view(torch.float32)
    everything = torch.cat([edges, bits[bits.isfinite() & (bits.abs() < 3e38)]])
    optimiser = AdamW({"a": torch.nn.Parameter(torch.zeros_like(everything, dtype=torch.bfloat16))}, betas=BETAS)
    optimiser._put("a", 0, len(everything), everything)
    assert torch.equal(optimiser._value("a", 0, len(everything)).view(torch.int32), everything.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_of_one_byte_move_rows_nearly_as_those_of_four(dtype: torch.dtype) -> None:
    start = values(0, 0.02, dtype)
    expected, got = torchs(30, dtype), ours(30, dtype, compact=True)
    for name, parameter in got.parameters.items():
        found = got._value(name, 0, parameter.numel()).view(parameter.shape)
        moved = (expected[name] - start[name].float()).norm()
        assert float((found - expected[name]).norm() / moved) < 0.03


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_beside_a_trained_value_are_counted_and_at_most_ten(dtype: torch.dtype, optimizer: str) -> None:
    rows = {"a": torch.nn.Parameter(torch.zeros(8, 64, BLOCK, dtype=dtype))}
    optimiser = AdamW(rows, betas=BETAS, compact=is_compact(optimizer))
    rows["a"].grad = torch.ones_like(rows["a"])
    gradient = rows["a"].grad.numel() * rows["a"].grad.element_size()
    optimiser.step(RATE)
    held = (gradient + optimiser.bytes()) / rows["a"].numel()
    # The gradient and what completes it to float32; both moments, with a scale for every block where they are compact.
    completed = {torch.float32: 4, torch.bfloat16: 2 + 2, torch.float16: 2 + 4}[dtype]
    assert held == completed + (2 * (1 + 4 / BLOCK) if is_compact(optimizer) else 8)
    if is_compact(optimizer):
        assert held <= 10


@pytest.mark.parametrize("compact", [False, True])
def test_kept_moments_go_on_where_they_stood(tmp_path: Path, compact: bool) -> None:
    whole = ours(6, torch.float32, compact=compact)
    half = ours(4, torch.float32, compact=compact)
    half.moments().save(tmp_path / "moments", {"cycle": "1"})
    again = Moments.load(tmp_path / "moments")
    assert again.steps == 4
    for kind, other in ((again.first, half.moments().first), (again.second, half.moments().second)):
        assert all(torch.equal(kind[name].values, other[name].values) for name in other)
    resumed = ours(2, torch.float32, compact=compact, start=again, skip=4)
    wanted, found = whole.moments(), resumed.moments()
    assert all(torch.equal(wanted.second[name].values, found.second[name].values) for name in ("a", "b"))


def test_a_file_holds_what_the_next_cycle_starts_from(tmp_path: Path) -> None:
    sizes = {}
    for compact in (False, True):
        for second_only in (False, True):
            path = tmp_path / f"{compact}{second_only}"
            optimiser = ours(3, torch.float32, compact=compact)
            optimiser.moments(second_only=second_only).save(path)
            sizes[compact, second_only] = path.stat().st_size
            kept = Moments.load(path, second_only=second_only)
            assert (kept.first == {}) is second_only
            assert kept.fit(optimiser.parameters)
    count = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert sizes[False, False] == pytest.approx(8 * count, rel=0.1)
    assert sizes[False, True] == pytest.approx(4 * count, rel=0.1)
    assert sizes[True, True] == pytest.approx(count, abs=600)


def test_moments_of_one_optimiser_start_the_other() -> None:
    """A miner may change its mind between cycles."""
    exact, compact = ours(5, torch.float32, compact=False), ours(5, torch.float32, compact=True)
    for start, kind in ((exact, True), (compact, False)):
        taken = ours(0, torch.float32, compact=kind, start=start.moments()).moments()
        assert taken.steps == 5
        for name, moment in taken.second.items():
            wanted = exact.moments().second[name].values
            found = moment.read(0, len(moment.values))
            assert float((found - wanted).norm() / wanted.norm()) < 0.03


def test_a_small_second_moment_beside_a_large_one_bounds_the_step() -> None:
    """What rounds to nothing in its block must not divide a first moment that did not."""
    row = torch.nn.Parameter(torch.zeros(BLOCK))
    optimiser = AdamW({"a": row}, betas=BETAS, compact=True)
    for step in range(8):
        # A large value that goes to and fro leaves a small first moment; the others soon have no gradient.
        row.grad = torch.full((BLOCK,), 2.5e-3 if step < 2 else 0.0)
        row.grad[0] = 1e3 * (-1) ** step
        optimiser.step(RATE)
    assert float(row.detach().abs().max()) < 8 * RATE


def test_a_block_of_zeros_stays_zero() -> None:
    moment = Moment.zeros(torch.zeros(2 * BLOCK), compact=True, signed=False)
    moment.write(0, torch.zeros(2 * BLOCK))
    assert not moment.read(0, 2 * BLOCK).any()


def test_bytes_of_other_tensors_do_not_fit() -> None:
    kept: Any = ours(1, torch.float32, compact=True).moments()
    others = {name: torch.nn.Parameter(torch.zeros(shape[0])) for name, shape in SHAPES.items()}
    assert not kept.fit(others)
    assert AdamW(others, betas=BETAS, start=kept).moments().steps == 0
