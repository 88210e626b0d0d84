"""DES-MoE: routers of two layers held to the shipped ones, a map of experts by domain, three phases."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from connito.experts.des_moe import STABLE, WARM_UP, AdaptiveRouter, DomainMap, Phases, adapt, fold, routed_by
from connito.experts.measure import loss
from connito.moe.personal import distance

from tests.support.models import Sequences


@pytest.fixture
def texts(sequences: Sequences) -> dict[str, torch.Tensor]:
    return {domain: torch.from_numpy(sequences(domain, 8, 60)) for domain in ("recipes", "logs")}


def test_an_adaptive_router_begins_as_the_shipped_one(full: Any, texts: dict[str, torch.Tensor]) -> None:
    """W₂·GELU(W₁h + b₁) + b₂ of the paper, written out with the error function; to begin with it is W·h."""
    router, ids = full.model.layers[2].mlp.gate, texts["logs"][:2, :-1].long()
    made = AdaptiveRouter(router.weight, None, torch.Generator().manual_seed(1))
    h = torch.randn(30, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(made(h), h @ router.weight.T, rtol=1e-4, atol=1e-5)
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        w1, b1, w2, b2 = (p.double().numpy() for p in (made.first, made.shift, made.second, made.last))
        inner = h.double().numpy() @ w1.T + b1
        gelu = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        assert w1.shape == (4 * 64, 64)
        np.testing.assert_allclose(made(h).numpy(), gelu @ w2.T + b2, rtol=1e-3, atol=1e-4)
        plain = full(input_ids=ids).logits
        routers = {i: AdaptiveRouter(full.model.layers[i].mlp.gate.weight, None, torch.Generator()) for i in (2, 3)}
        with routed_by(full, routers):
            torch.testing.assert_close(full(input_ids=ids).logits, plain, rtol=1e-3, atol=1e-4)


def test_the_map_the_mask_and_the_distance_are_the_papers() -> None:
    rng, domains = np.random.default_rng(0), DomainMap()
    want = {name: np.zeros(6) for name in "ab"}
    for turn in range(7):
        name, ids = "ab"[turn % 2], rng.integers(0, 4 if turn % 2 else 6, size=(9, 2))
        domains.see(name, 3, torch.from_numpy(ids), 6)
        share = np.array([sum(e in (slot,) for slot in ids.flat) for e in range(6)]) / ids.size
        want[name] = 0.9 * want[name] + 0.1 * share
        np.testing.assert_allclose(domains.affinity[name][3], want[name], rtol=1e-12)
        assert domains.own(name, 3).tolist() == [bool(a >= 0.6 * max(want[name])) for a in want[name]]
    p, q = (rng.normal(size=(5, 6)) for _ in range(2))
    chances = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (p, q)]
    divergence = (chances[0] * np.log(chances[0] / chances[1])).sum(1).mean()
    assert float(distance(torch.from_numpy(p), torch.from_numpy(q))) == pytest.approx(divergence)


def test_phases_follow_each_other_and_the_weight_falls() -> None:
    phases = Phases(0.25, 0.5, 0.8)
    found = [phases.at(step, 8) for step in range(8)]
    assert [phase for phase, _ in found] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert [weight for _, weight in found] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0])


@pytest.mark.parametrize(("phases", "phase"), [(Phases(1, 1), 1), (Phases(0, 1), 2), (Phases(0, 0.25), 3)])
def test_only_the_batchs_domain_moves_its_experts(
    full: Any, texts: dict[str, torch.Tensor], phases: Phases, phase: int
) -> None:
    model, one = copy.deepcopy(full), {"logs": texts["logs"]}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt(model, one, 4, phases=phases)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"model.layers.{i}.mlp.experts.{bank}" for i in (2, 3) for bank in ("gate_up_proj", "down_proj")}
    for i in (2, 3):
        bank = f"model.layers.{i}.mlp.experts.down_proj"
        rows = (after[bank] != before[bank]).any(-1).any(-1)
        if phase == WARM_UP:
            assert int(rows.sum()) > int(adapted.domains.own("logs", i).sum())
        else:
            assert not (rows & ~adapted.domains.own("logs", i)).any() or phase == STABLE
            assert rows.any()
        start = AdaptiveRouter(full.model.layers[i].mlp.gate.weight, None, torch.Generator())
        assert torch.equal(adapted.routers[i].second, start.second) == (phase == 3 and phases.stable == 0)


@pytest.mark.slow
def test_domains_are_learned_and_a_linear_router_can_be_had(full: Any, texts: dict[str, torch.Tensor]) -> None:
    model, table = copy.deepcopy(full), texts["recipes"].numpy()
    adapted = adapt(model, texts, 24)
    with routed_by(model, adapted.routers):
        learned = loss(model, table)
    assert learned < loss(full, table) - 0.1
    folded = fold(model, adapted, torch.cat([*texts.values()])[:, :-1])
    assert loss(folded, table) == pytest.approx(learned, abs=0.02)
    assert type(folded) is type(full)
