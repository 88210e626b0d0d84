"""Fixtures of experts: `parts` one expert a domain trained on the tiny base, `base` the rows of the base that they replace.

recipes and logs share some rows: overlaps are what composition is about. poems has the rows it uses most of those that
are left; which ones differs between processors, whose rounding makes different tiny models of one seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.base.loading import load_full
from connito.experts.compose import Part, base_rows, rows_of
from connito.moe.resident import compress
from connito.moe.statistics import collect
from connito.moe.training import train_local

from tests.support.models import Sequences

LAYERS = {
    "recipes": {2: [0, 1, 2], 3: [1, 4]},
    "logs": {2: [1, 2, 5], 3: [4, 6]},
}


@pytest.fixture(scope="session")
def parts(tiny: Path, sequences: Sequences) -> dict[str, Part]:
    used = collect(load_full(tiny), sequences("poems", 12, 50)).layers
    taken = {layer: {e for layers in LAYERS.values() for e in layers[layer]} for layer in (2, 3)}
    poems = {
        layer: sorted([int(e) for e in np.argsort(-used[layer].token_score) if e not in taken[layer]][:2])
        for layer in (2, 3)
    }
    out = {}
    for number, (domain, layers) in enumerate({**LAYERS, "poems": poems}.items()):
        model = compress(
            load_full(tiny), layers, {layer: [e for e in range(8) if e not in x] for layer, x in layers.items()}
        )
        batches = sequences(domain, 96, 50).reshape(12, 8, -1)
        state, _ = train_local(model, batches, learning_rate=2e-3)
        out[domain] = Part(domain, f"{number}" * 64, rows_of(layers, state))
    return out


@pytest.fixture
def base(full: Any, parts: dict[str, Part]) -> Any:
    return base_rows(full, list(parts.values()))
