"""Additions that are trained against an anchor, and a router that is trained over variants."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.branches import train_routers
from connito.errors import Invalid
from connito.experts.arrow import linear_router, train_router, variants
from connito.experts.compose import Part
from connito.experts.flex import grow, opt_in, opt_out
from connito.experts.measure import loss
from connito.moe.layout import find_moe_layers
from connito.moe.rows import fingerprint

from tests.support.models import Sequences

pytestmark = pytest.mark.slow


@pytest.fixture
def anchor_text(sequences: Sequences) -> Any:
    return np.concatenate([sequences(d, 3, 31)[:, :-1] for d in ("recipes", "logs", "poems", "ledgers")])


@pytest.fixture
def additions(full: Any, sequences: Sequences, anchor_text: Any) -> Any:
    return [
        grow(full, d, sequences(d, 48, 50).reshape(12, 4, -1), anchor_text, learning_rate=3e-3)
        for d in ("recipes", "logs")
    ]


def test_grown_additions_help_their_domain_in_any_order_and_leave_the_anchor_alone(
    full: Any, additions: Any, sequences: Sequences
) -> None:
    before, held = fingerprint(full), {d: sequences(d, 8, 90) for d in ("recipes", "logs")}
    plain = {d: loss(full, table) for d, table in held.items()}
    models = [copy.deepcopy(full) for _ in range(2)]
    ids = [opt_in(model, order) for model, order in zip(models, (additions, additions[::-1]), strict=True)]
    assert fingerprint(models[0]) == fingerprint(models[1])
    assert ids[0] == ids[1]
    assert all(loss(models[0], table) < plain[d] - 0.01 for d, table in held.items())
    for row, addition in zip(additions[0].rows.values(), additions[1].rows.values(), strict=True):
        assert not torch.equal(row["router.weight"], addition["router.weight"])
    opt_out(models[0], ids[0], ["recipes", "logs"])
    assert fingerprint(models[0]) == fingerprint(full) == before


def test_growing_twice_gives_the_same_addition(
    full: Any, additions: Any, sequences: Sequences, anchor_text: Any
) -> None:
    again = grow(full, "recipes", sequences("recipes", 48, 50).reshape(12, 4, -1), anchor_text, learning_rate=3e-3)
    assert again.digest == additions[0].digest


def test_a_trained_router_beats_the_uniform_mixture_and_touches_nothing(
    full: Any, base: Any, parts: dict[str, Part], sequences: Sequences
) -> None:
    before = fingerprint(full)
    members = [parts["recipes"], parts["logs"]]
    text = np.concatenate([sequences(d, 4, 70) for d in ("recipes", "logs")])
    held = np.concatenate([sequences(d, 4, 90) for d in ("recipes", "logs")])
    gates = train_router(full, members, base, text, steps=24)
    losses = []
    for table in ({layer: torch.zeros_like(gate) for layer, gate in gates.items()}, gates):
        with variants(full, members, base, linear_router(table)):
            losses.append(loss(full, held))
    assert losses[1] < losses[0]
    assert fingerprint(full) == before
    with pytest.raises(Invalid, match="no text"):
        train_router(full, members, base, text[:0])


def test_routers_are_trained_over_all_additions_at_the_end_and_an_upgrade_leaves_the_others(
    full: Any, additions: Any, sequences: Sequences, anchor_text: Any
) -> None:
    """BAR: experts trained apart beside a frozen anchor, one upgraded at a time, routers on a little text of all at the end."""
    domains = ("recipes", "logs")
    held = np.concatenate([sequences(d, 8, 90) for d in domains])
    model = copy.deepcopy(full)
    ids = opt_in(model, additions)
    little = {d: sequences(d, 8, 70) for d in domains}
    joined, told, before = loss(model, held), loss(model, np.concatenate([*little.values()])), fingerprint(model)
    train_routers(model, {d: torch.from_numpy(t[:, :-1].astype("int64")) for d, t in little.items()}, 20)
    after = fingerprint(model)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {f"{layer.router_name}.weight" for layer in find_moe_layers(model).values()}
    assert loss(model, np.concatenate([*little.values()])) < told
    # On other text it is a wash here: the rows that were trained apart already route as well.
    assert loss(model, held) < joined + 0.005
    better = grow(full, "recipes", sequences("recipes", 96, 50).reshape(24, 4, -1), anchor_text, learning_rate=3e-3)
    upgraded = copy.deepcopy(full)
    again = opt_in(upgraded, [better, additions[1]])
    assert ids.keys() == again.keys()
    layers = find_moe_layers(upgraded)
    for index, experts in again["logs"].items():
        rows: Any = additions[1].rows[index]
        assert all(
            torch.equal(getattr(layers[index].experts, n)[experts[0]], rows[n]) for n in layers[index].parameters
        )
    table = sequences("recipes", 8, 90)
    with_old = copy.deepcopy(full)
    opt_in(with_old, additions)
    assert loss(upgraded, table) < loss(with_old, table)
