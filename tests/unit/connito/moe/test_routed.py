"""Tokens by selected expert, counted by who trains and by who judges."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from connito.data.packing import PADDING, ROW
from connito.moe.resident import compress
from connito.moe.routed import routed_tokens
from connito.moe.statistics import collect

SELECTION = {2: [5, 0, 1], 3: [7, 4]}
ROWS = {2: [0, 1, 5], 3: [4, 7]}


def test_counts_are_the_routers_own_in_the_order_of_a_states_rows(full: Any, sequences: Any) -> None:
    text = sequences("recipes", 6, 3)
    found, all_ = routed_tokens(full, SELECTION, text), collect(full, text[:, :-1])
    assert found == {layer: all_.layers[layer].counts[experts].tolist() for layer, experts in ROWS.items()}
    assert not any(module._forward_hooks for module in full.modules())


@pytest.mark.parametrize("mode", ["natural", "masked", "restricted"])
def test_a_training_model_says_what_the_full_one_does_in_every_routing_mode(
    full: Any, sequences: Any, mode: str
) -> None:
    text = sequences("logs", 6, 4)
    whole = routed_tokens(full, SELECTION, text)
    others = {layer: [e for e in range(8) if e not in experts] for layer, experts in ROWS.items()}
    model = compress(copy.deepcopy(full), SELECTION, others, routing_mode=mode)
    assert routed_tokens(model, SELECTION, text) == whole
    # With few helpers the layer above sees other states, and asks its router all the same.
    few = compress(full, SELECTION, {2: [3], 3: [0]}, routing_mode=mode)
    near = routed_tokens(few, SELECTION, text)
    assert near[2] == whole[2]
    assert sum(abs(a - b) for a, b in zip(near[3], whole[3], strict=True)) < 0.1 * 6 * 64


def test_what_fills_a_row_up_is_no_text(full: Any, sequences: Any) -> None:
    text = sequences("poems", 2, 5)
    rows = np.zeros((2, 65), ROW)
    rows["token"], rows["position"], rows["counts"] = text, np.arange(65), True
    assert routed_tokens(full, SELECTION, rows) == routed_tokens(full, SELECTION, text)
    rows["position"][1], rows["token"][1] = PADDING, 0
    torch.testing.assert_close(routed_tokens(full, SELECTION, rows), routed_tokens(full, SELECTION, text[:1]))
