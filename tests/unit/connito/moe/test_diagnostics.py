"""What interventions in a model say, and the pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from connito.moe.diagnostics import causal_effects, coactivation, low_use, measure, overlap, top1_ratio, utilisation
from connito.moe.layout import require_moe_layers
from connito.moe.plots import write_plots
from connito.moe.selection import select_experts
from connito.moe.statistics import RoutingStatistics, collect

pytestmark = pytest.mark.slow


@pytest.fixture
def varied(full: Any) -> Any:
    """The tiny base with experts that differ, and one that does nothing. Freshly upcycled ones are all alike."""
    draw = torch.Generator().manual_seed(2)
    for layer in require_moe_layers(full).values():
        with torch.no_grad():
            bank: Any = layer.experts.down_proj
            bank.add_(0.2 * torch.randn(bank.shape, generator=draw))
            bank[5].zero_()
    return full


def test_the_effect_of_an_expert_is_what_the_output_loses_without_its_gate(varied: Any, sequences: Any) -> None:
    text = sequences("recipes", 3, 5)[:, :-1]
    top = max(require_moe_layers(varied))
    effects = causal_effects(varied, {top: list(range(8))}, text)[top]
    counts = collect(varied, text).layers[top].counts
    assert effects[5] == pytest.approx(0.0, abs=1e-6), "an expert that adds nothing is not missed"
    assert all(effects[int(e)] == pytest.approx(0.0, abs=1e-6) for e in np.flatnonzero(counts == 0))
    assert max(effects.values()) > 1e-3

    # The same by hand: the expert's output is zero, which is what a gate of zero makes of it.
    expert = max(effects, key=lambda e: effects[e])
    ids = torch.from_numpy(text.astype(np.int64))
    with torch.no_grad():
        before = varied(input_ids=ids).logits.log_softmax(-1)
        bank: Any = require_moe_layers(varied)[top].experts.down_proj
        bank[expert].zero_()
        after = varied(input_ids=ids).logits.log_softmax(-1)
    by_hand = float((before.exp() * (before - after)).sum(-1).double().mean())
    assert effects[expert] == pytest.approx(by_hand, rel=1e-4)


def test_the_budget_takes_the_best_of_every_layer_and_leaves_the_model_as_it_was(varied: Any, sequences: Any) -> None:
    text = sequences("recipes", 2, 5)
    layers = {index: [0, 4, 2] for index in require_moe_layers(varied)}
    before = {name: tensor.clone() for name, tensor in varied.state_dict().items()}
    told: list[tuple[int, int]] = []
    found = measure(varied, layers, text, budget=3, progress=lambda done, of: told.append((done, of)))
    first, second = layers
    assert found["causal_effect"].keys() == {str(first), str(second)}
    assert set(found["causal_effect"][str(first)]) == {"0", "4"}
    assert set(found["causal_effect"][str(second)]) == {"0"}
    assert told[-1] == (3, 3)
    assert found["drivers"]
    assert all(tensor.equal(varied.state_dict()[name]) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in varied.modules())


def test_one_expert_alone_is_all_there_is_when_experts_are_alike(full: Any, varied: Any, sequences: Any) -> None:
    text = sequences("recipes", 3, 5)
    assert top1_ratio(varied, text) > 1.0005
    for layer in require_moe_layers(full).values():
        with torch.no_grad():
            for bank in (getattr(layer.experts, name) for name in layer.parameters):
                bank.copy_(bank[:1].expand_as(bank))
    assert top1_ratio(full, text) == pytest.approx(1.0, abs=1e-4)


def counted(*choices: list[int]) -> RoutingStatistics:
    out = RoutingStatistics()
    out.add(0, 4, np.array(choices), np.tile([0.6, 0.4], (len(choices), 1)))
    return out


def test_figures_from_counts() -> None:
    alone, even = counted([0, 1], [0, 1]), counted([0, 1], [2, 3])
    assert utilisation(even.layers[0]) == pytest.approx(1.0)
    assert utilisation(alone.layers[0]) == pytest.approx(0.5)
    assert low_use(alone.layers[0]) == [2, 3]
    assert overlap(alone, even) == pytest.approx(0.5)
    together = coactivation(counted([0, 1], [0, 2]).layers[0])
    assert together[0].tolist() == [0.0, 0.5, 0.5, 0.0]
    assert together[1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert together[3].tolist() == [0.0] * 4


def test_pictures_show_every_expert_and_frame_the_selected(tmp_path: Path) -> None:
    domains = {"law & order": counted([0, 1], [0, 2]), "verse": counted([2, 3], [3, 1])}
    chosen = select_experts(
        domains["law & order"], "esft-token", 0.5, general={"verse": domains["verse"]}, domain="law & order"
    )
    chosen.diagnostics["causal_effect"] = {"0": {"0": 0.2}}
    written = write_plots(tmp_path, chosen, domains)
    assert {path.name for path in written} == {
        "routing.svg",
        "overlap.svg",
        "entropy.svg",
        "coactivation.svg",
        "causal.svg",
    }
    for path in written:
        ElementTree.fromstring(path.read_text())
    cells = [e for e in ElementTree.parse(tmp_path / "routing.svg").iter() if e.tag.endswith("rect")]
    assert len(cells) == 1 + 2 * 4
    assert sum("stroke" in cell.attrib for cell in cells) == 2 * len(chosen.layers[0])
