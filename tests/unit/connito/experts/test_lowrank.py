"""Experts made smaller in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.errors import Invalid
from connito.experts.lowrank import factorise, low_rank, ranks, sparsify
from connito.experts.measure import loss
from connito.moe.rows import fingerprint

from tests.support.models import Sequences


@pytest.fixture(scope="session")
def tiny(distinct_tiny: Path) -> Path:
    """Experts that differ, so that it matters which are left out."""
    return distinct_tiny


def put(model: Any, factors: dict[str, torch.Tensor]) -> None:
    for name in (name for name in factors if name.endswith(".a")):
        _, layer, bank, expert, _ = name.split(".")
        with torch.no_grad():
            getattr(model.model.layers[int(layer)].mlp.experts, bank)[int(expert)] = (
                factors[name] @ factors[name[:-1] + "b"]
            )


def test_full_rank_factors_are_the_matrix_and_error_falls_with_rank() -> None:
    w = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    errors = []
    for rank in range(1, 9):
        a, b = factorise(w, rank)
        assert (a.shape, b.shape) == ((12, rank), (rank, 8))
        errors.append(float((w - a @ b).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    assert errors[3] == pytest.approx(float(torch.linalg.svdvals(w)[4:].norm()), rel=1e-4)
    with pytest.raises(Invalid):
        factorise(w, 9)


def test_ranks_that_an_expert_cannot_use_go_to_the_others() -> None:
    chosen = ranks([0.9, 0.05, 0.05], (64, 32), 0.5)
    assert chosen[0] == 64 * 32 // (64 + 32)
    assert sum(chosen) == int(0.5 * 3 * 64 * 32 / (64 + 32))


def test_ranks_follow_importance_within_the_budget() -> None:
    chosen = ranks([0.6, 0.3, 0.1], (64, 32), 0.5)
    assert chosen == sorted(chosen, reverse=True)
    assert sum(chosen) * (64 + 32) <= 0.5 * 3 * 64 * 32
    assert ranks([1.0, 0.0], (64, 32), 1.0) == [21, 1]


def test_factors_are_smaller_and_rebuild_the_same_model(
    full: Any, tiny: Path, sequences: Sequences, logits: Callable[..., Any]
) -> None:
    from connito.base.loading import load_full

    factors, chosen = low_rank(full, sequences("recipes", 2, 60)[:, :-1], 0.5)
    numbers = sum(t.numel() for t in factors.values())
    assert numbers <= 0.55 * sum(
        full.model.layers[i].mlp.experts.gate_up_proj.numel() + full.model.layers[i].mlp.experts.down_proj.numel()
        for i in (2, 3)
    )
    assert all(len(r) == 8 for r in chosen.values())
    again = load_full(tiny)
    put(again, factors)
    assert fingerprint(again) == fingerprint(full)


def test_dropping_no_weight_changes_no_bit(full: Any, sequences: Sequences) -> None:
    before = fingerprint(full)
    sparsify(full, sequences("recipes", 1, 60)[:, :-1], 0.0)
    assert fingerprint(full) == before


def test_router_weighted_sparsity_hits_its_share_and_beats_magnitude(
    full: Any, tiny: Path, sequences: Sequences
) -> None:
    from connito.base.loading import load_full

    text, held = sequences("recipes", 6, 60), sequences("recipes", 4, 61)
    zeros = sparsify(full, text[:, :-1], 0.5)
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros.values())
    other: Any = load_full(tiny)
    with torch.no_grad():
        for index in (2, 3):
            for bank in (
                other.model.layers[index].mlp.experts.gate_up_proj,
                other.model.layers[index].mlp.experts.down_proj,
            ):
                lowest = bank.abs().topk(bank.shape[-1] // 2, dim=-1, largest=False).indices
                bank.scatter_(-1, lowest, 0)
    assert loss(full, held) < loss(other, held)
    with pytest.raises(Invalid):
        sparsify(full, text, 1.0)
