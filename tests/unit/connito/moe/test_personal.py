"""FFT-MoE: a miner's own routers, at its own number of experts a token, held to the shipped ones and to even use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.loading import load_full
from connito.moe.personal import Personal, PersonalRouters
from connito.moe.resident import adapted_layers, compress, read_targets, write_targets
from connito.moe.training import train_local
from safetensors.torch import load_file

SELECTION = {2: [1, 6], 3: [4]}
HELPERS = {layer: [e for e in range(8) if e not in experts] for layer, experts in SELECTION.items()}


def model_of(tiny: Path, top_k: int = 0) -> Any:
    return compress(load_full(tiny), SELECTION, HELPERS, top_k=top_k)


def batches(table: Any, steps: int, size: int = 4) -> Any:
    return table[np.random.default_rng(0).integers(len(table), size=(steps, size))]


@pytest.mark.parametrize("k", [1, 2])
def test_own_routers_and_their_loss_are_the_papers(tiny: Path, sequences: Any, k: int) -> None:
    """The choice from softmax(h·Wᵀ + h·Dᵀ) at the miner's k; λ·KL and α·(1 − H(f)/ln N)·N·Σ f·P, written out."""
    model = model_of(tiny, top_k=k)
    rng = np.random.default_rng(4)
    start = {str(i): torch.from_numpy(0.3 * rng.normal(size=(8, 64))).float() for i in (2, 3)}
    own = PersonalRouters(model, Personal(0.7, 1.0, 0.3), start)
    seen: dict[int, tuple[Any, Any]] = {}
    for index, (_, router) in adapted_layers(model).items():
        router.register_forward_hook(lambda r, a, out, i=index: seen.__setitem__(i, (a[0], out)))
    own.begin(0, 1)
    with torch.no_grad():
        model(input_ids=torch.from_numpy(sequences("logs", 2, 1)).long())
    terms = []
    for index, (tokens, (_, weights, ids)) in seen.items():
        h = tokens.reshape(-1, 64).double().numpy()
        w = adapted_layers(model)[index][1].weight.detach().double().numpy()
        shipped, moved = h @ w.T, h @ w.T + h @ start[str(index)].double().numpy().T
        p, q = (np.exp(x - x.max(1, keepdims=True)) for x in (shipped, moved))
        p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
        best = np.argsort(-q, axis=1)[:, :k]
        gates = np.take_along_axis(q, best, 1)
        np.testing.assert_array_equal(ids.numpy().reshape(len(h), -1), best)
        np.testing.assert_allclose(weights.reshape(len(h), -1), gates / gates.sum(1, keepdims=True), rtol=1e-3)
        f = np.bincount(best.flat, minlength=8) / best.size
        entropy = -sum(x * np.log(x) for x in f if x > 0)
        kl = (p * np.log(p / q)).sum(1).mean()
        terms.append(0.7 * kl + 0.3 * (1 - entropy / np.log(8)) * 8 * (f * q.mean(0)).sum())
    assert float(own.loss()) == pytest.approx(np.mean(terms), rel=1e-3)
    assert float(own.loss()) == 0.0


def test_own_routers_learn_stay_with_the_miner_and_leave_the_shipped_ones(
    tiny: Path, sequences: Any, tmp_path: Path
) -> None:
    table, model = sequences("logs", 20, 1), model_of(tiny, top_k=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    start = read_targets(model)
    own = PersonalRouters(model, Personal(0.1, 0.5))
    train_local(model, batches(table, 4), learning_rate=1e-3, beside=own)
    assert all(float(shift.detach().abs().sum()) > 0 for shift in own.shift.values())
    assert [experts.connito_reroute.top_k for experts, _ in adapted_layers(model).values()] == [1, 1]
    own.close()
    own.save(tmp_path / "routers")
    again = PersonalRouters(model_of(tiny), Personal(0.1), load_file(tmp_path / "routers"))
    assert all(torch.equal(again.shift[index], shift) for index, shift in own.shift.items())
    write_targets(model, start)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "a router moved"


def test_a_strong_weight_holds_them_and_no_share_is_plain_training(tiny: Path, sequences: Any) -> None:
    table = sequences("logs", 20, 1)

    def moved(weight: float) -> float:
        model = model_of(tiny)
        own = PersonalRouters(model, Personal(weight, 1.0))
        train_local(model, batches(table, 6), learning_rate=1e-3, beside=own)
        with torch.no_grad():
            model(input_ids=torch.from_numpy(table[:4]).long())
        return float(own.loss().detach()) / weight

    assert moved(100.0) < 0.5 * moved(0.5)
    model = model_of(tiny)
    off, _ = train_local(
        model, batches(table, 2), learning_rate=1e-3, beside=PersonalRouters(model, Personal(1.0, 0.0))
    )
    plain, _ = train_local(model_of(tiny), batches(table, 2), learning_rate=1e-3)
    assert all(torch.equal(off[name], plain[name]) for name in plain)
