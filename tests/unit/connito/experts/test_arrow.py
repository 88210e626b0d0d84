"""Several variants of one expert at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from connito.errors import Invalid
from connito.experts.arrow import (
    arrow,
    fixed,
    linear_router,
    prototype,
    variants,
)
from connito.experts.compose import Part, layers_of, state_of
from connito.moe.rows import fingerprint, write_rows

from tests.support.models import Sequences

pytestmark = pytest.mark.slow


@pytest.fixture
def ids(sequences: Sequences) -> Any:
    return torch.from_numpy(sequences("recipes", 2, 60)[:, :-1].astype("int64"))


def logits(model: Any, ids: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def test_one_hot_mixing_is_the_single_expert_exactly(full: Any, parts: dict[str, Part], base: Any, ids: Any) -> None:
    three = list(parts.values())
    plain, before = logits(full, ids), fingerprint(full)
    mixed = {}
    for i, part in enumerate(three):
        with variants(full, three, base, fixed([float(i == j) for j in range(3)])) as model:
            mixed[part.name] = logits(model, ids)
    assert fingerprint(full) == before
    assert torch.equal(logits(full, ids), plain)
    for part in three:
        write_rows(full, layers_of(part.rows), state_of(part.rows))
        assert torch.equal(mixed[part.name], logits(full, ids))
        write_rows(full, layers_of(base), state_of(base))


def test_mixing_identical_variants_is_any_of_them(full: Any, parts: dict[str, Part], base: Any, ids: Any) -> None:
    twins = [parts["recipes"], Part("twin", "9" * 64, parts["recipes"].rows)]
    gates = {layer: torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) for layer in (2, 3)}
    with variants(full, twins, base, fixed([1.0, 0.0])):
        single = logits(full, ids)
    for mixing in (fixed([0.5, 0.5]), arrow(twins, base), linear_router(gates)):
        with variants(full, twins, base, mixing):
            torch.testing.assert_close(logits(full, ids), single, rtol=1e-4, atol=1e-4)


def test_a_variant_whose_prototype_meets_every_token_takes_them_all(
    full: Any, parts: dict[str, Part], base: Any, ids: Any
) -> None:
    three = list(parts.values())
    sharp = arrow(three, base, temperature=1e-6, top_k=1)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    alpha = sharp(2, 1, x)
    assert torch.equal(alpha.sum(dim=1), torch.ones(5))
    assert set(alpha.flatten().tolist()) == {0.0, 1.0}
    direction = prototype(parts["logs"].rows, base, (2, 5)).float()
    assert sharp(2, 5, direction[None] * 3).argmax() == 1  # only logs moved expert 5 of layer 2


def test_the_prototype_of_a_rank_one_change_is_its_input_direction(base: Any) -> None:
    key = (2, 0, "gate_up_proj")
    v = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(2)), dim=0)
    u = torch.randn(256, generator=torch.Generator().manual_seed(3))
    moved = {key: base[key] + torch.outer(u, v)}
    assert abs(float(prototype(moved, base, (2, 0)).float() @ v)) == pytest.approx(1, abs=1e-4)
    assert not prototype({key: base[key]}, base, (2, 0)).any()


def test_a_layer_mixes_inside_every_map_token_by_token(full: Any, parts: dict[str, Part], base: Any) -> None:
    """MoLoRA's layer from its formula, a token and a variant at a time: y = Σ_v softmax(G x)_v W_v x in each map."""
    three, generator = list(parts.values()), torch.Generator().manual_seed(3)
    gates = {layer: torch.randn(3, 64, generator=generator) for layer in (2, 3)}
    x, weights = torch.randn(12, 64, generator=generator), torch.rand(12, 2, generator=generator)
    chosen = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in range(12)])
    bank = full.model.layers[2].mlp.experts

    def mixed(name: str, expert: int, alpha: Any, token: Any) -> Any:
        if (2, expert, name) not in base:
            return getattr(bank, name)[expert] @ token
        rows = [part.rows.get((2, expert, name), base[2, expert, name]) for part in three]
        return sum(float(share) * (row @ token) for share, row in zip(alpha, rows, strict=True))

    want = torch.zeros(12, 64)
    for t in range(12):
        for expert, weight in zip(chosen[t].tolist(), weights[t], strict=True):
            scores = torch.exp(gates[2] @ x[t])
            alpha = scores / scores.sum()
            gate, up = mixed("gate_up_proj", expert, alpha, x[t]).chunk(2)
            inner = gate / (1 + torch.exp(-gate)) * up
            want[t] += weight * mixed("down_proj", expert, alpha, inner)
    assert {expert for layer, expert, _ in base if layer == 2} & set(chosen.flatten().tolist())
    with variants(full, three, base, linear_router(gates)), torch.inference_mode():
        torch.testing.assert_close(bank(x, chosen, weights), want, rtol=1e-4, atol=1e-5)


def test_gates_can_be_learned(full: Any, parts: dict[str, Part], base: Any, sequences: Sequences) -> None:
    """MoLoRA's router is trained with everything else frozen."""
    from connito.moe.head import Head

    gates = {layer: torch.zeros(3, 64, requires_grad=True) for layer in (2, 3)}
    ids = torch.from_numpy(sequences("recipes", 4, 50).astype("int64"))
    optimiser, losses = torch.optim.Adam(gates.values(), lr=0.1), []
    with variants(full, list(parts.values()), base, linear_router(gates)):
        for _ in range(6):
            loss = Head(full).nll(ids[:, :-1], ids[:, 1:]).mean()
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is None for parameter in full.parameters())


def test_weights_must_be_a_share() -> None:
    with pytest.raises(Invalid, match="not to 1"):
        fixed([0.5, 0.2])
