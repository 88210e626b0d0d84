"""Driver experts over all layers, and more weight on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from connito.experts.measure import loss
from connito.experts.steering import find_drivers, raised, steer_drivers

from tests.support.models import Sequences


@pytest.fixture(scope="session")
def tiny(distinct_tiny: Path) -> Path:
    """Experts that differ."""
    return distinct_tiny


def test_drivers_are_those_without_whose_gate_the_output_changes_most(full: Any, sequences: Sequences) -> None:
    """KL(P ‖ P with the gate at zero), of every expert of every layer, by replacing the expert's rows with zeros."""
    text = sequences("recipes", 2, 60)[:, :-1]
    ids, effects = torch.from_numpy(text.astype("int64")), {}
    with torch.no_grad():
        plain = full(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for layer in (2, 3):
            bank = full.model.layers[layer].mlp.experts.down_proj
            for expert in range(8):
                kept = bank[expert].clone()
                bank[expert] = 0
                other = full(input_ids=ids, use_cache=False).logits.log_softmax(-1)
                bank[expert] = kept
                effects[layer, expert] = float((plain.exp() * (plain - other)).sum(-1).mean())
    best = sorted(effects, key=lambda place: -effects[place])[:4]
    found = find_drivers(full, text, 4)
    assert {(layer, expert) for layer, experts in found.items() for expert in experts} == set(best)


def test_raised_weights_are_the_routers_times_the_factor_at_the_same_sum(full: Any, sequences: Sequences) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    block = full.model.layers[2].mlp
    with torch.no_grad():
        _, weights, ids = block.gate(x)
        with raised(full, {2: [1, 5]}, 3.0):
            _, changed, same = block.gate(x)
    assert torch.equal(ids, same)
    for token in range(40):
        want = [float(w) * (3.0 if int(e) in (1, 5) else 1.0) for w, e in zip(weights[token], ids[token], strict=True)]
        scale = float(weights[token].sum()) / sum(want)
        assert changed[token].tolist() == pytest.approx([w * scale for w in want], rel=1e-5)
    assert not torch.equal(weights, changed)


def test_a_factor_of_one_is_the_model_and_the_chosen_one_is_no_worse_on_the_deciding_text(
    full: Any, sequences: Sequences
) -> None:
    text, held = sequences("recipes", 4, 60), sequences("recipes", 4, 61)
    found = steer_drivers(full, text, held, count=4, factor=1.0)
    assert found.full == found.loss == loss(full, held)
    tuned = steer_drivers(full, text, held, count=4)
    with raised(full, tuned.drivers, tuned.factor):
        chosen = loss(full, text)
    assert chosen <= loss(full, text) + 1e-9
