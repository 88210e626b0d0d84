from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.loading import load_full
from connito.errors import Invalid
from connito.moe.evaluate import Evaluator
from connito.moe.resident import compress, write_targets
from connito.moe.rows import assert_only_changed, fingerprint, write_rows
from connito.moe.selection import select_experts
from connito.moe.statistics import collect
from connito.moe.training import train_local

DOMAINS = ("recipes", "logs", "poems", "ledgers")


def batches(table: Any, steps: int, size: int, seed: int) -> Any:
    return table[np.random.default_rng(seed).integers(len(table), size=(steps, size))]


def test_three_cycles_lower_the_held_out_loss_of_the_domain_and_of_no_other(tiny: Path, sequences: Any) -> None:
    """The whole point, small: select, train three miners on the experts, average, and look at the full model."""
    routed = {domain: collect(load_full(tiny), sequences(domain, 12, 500)[:, :-1]) for domain in DOMAINS}
    chosen = select_experts(routed["recipes"], "esft-token", 0.5, helpers_per_layer=2)
    judge = Evaluator(load_full(tiny), chosen)
    held = {domain: sequences(domain, 24, 900) for domain in DOMAINS}
    before = {domain: judge.losses(judge.base, held[domain])[0] for domain in DOMAINS}
    state, worker, train = judge.base, compress(load_full(tiny), chosen, chosen.helpers), sequences("recipes", 150, 700)
    for cycle in range(3):
        results = []
        for miner in range(2):
            write_targets(worker, state)
            results.append(train_local(worker, batches(train, 20, 6, 10 * cycle + miner), learning_rate=5e-4)[0])
        state = {name: (results[0][name] + results[1][name]) / 2 for name in state}
    change = {domain: (judge.losses(state, held[domain])[0] - before[domain]) / 64 for domain in DOMAINS}
    gain = -change["recipes"]
    assert gain.mean() > 0.05
    assert gain.mean() > 4 * gain.std() / len(gain) ** 0.5, "significant on paired sequences"
    assert all(abs(change[domain].mean()) < 0.01 for domain in DOMAINS[1:])


def test_training_touches_only_selected_rows_of_the_full_model(tiny: Path, full: Any, sequences: Any) -> None:
    selection = {2: [1, 6], 3: [4]}
    state, stats = train_local(
        compress(load_full(tiny), selection, {2: [0]}),
        batches(sequences("logs", 20, 1), 3, 4, 0),
        learning_rate=1e-3,
        weight_decay=0.1,
    )
    assert (stats.steps, stats.tokens) == (3, 3 * 4 * 64)
    before = fingerprint(full)
    write_rows(full, selection, state)
    assert len(assert_only_changed(before, full, selection)) == 2 * 3


def test_training_is_reproducible(tiny: Path, sequences: Any) -> None:
    def once() -> Any:
        model = compress(load_full(tiny), {2: [1]}, {2: [0]})
        return train_local(model, batches(sequences("logs", 20, 1), 3, 2, 0), learning_rate=1e-3)[0]

    first, second = once(), once()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_are_reported_and_can_be_stopped(tiny: Path, sequences: Any) -> None:
    seen: list[int] = []
    model = compress(load_full(tiny), {2: [1]})
    _, stats = train_local(
        model,
        batches(sequences("logs", 20, 1), 5, 1, 0),
        learning_rate=1e-4,
        on_step=lambda step: seen.append(step.index),
        should_stop=lambda: len(seen) >= 2,
    )
    assert seen == [0, 1]
    assert stats.steps == 2


def test_a_loss_that_leaves_the_numbers_is_refused_with_the_remedy(tiny: Path, sequences: Any) -> None:
    model = compress(load_full(tiny), {2: [1, 2, 3, 4]})
    with pytest.raises(Invalid, match="lower learning_rate"):
        train_local(model, batches(sequences("logs", 20, 1), 8, 2, 0), learning_rate=1e25)
    with pytest.raises(Invalid, match="compressed model"):
        train_local(load_full(tiny), batches(sequences("logs", 20, 1), 1, 1, 0), learning_rate=1e-3)


def test_bf16_training_also_learns(tiny: Path, sequences: Any) -> None:
    model = compress(load_full(tiny), {2: [1, 6], 3: [4]}, {2: [0], 3: [0]})
    batch = batches(sequences("logs", 4, 1), 1, 4, 0).repeat(12, axis=0)
    state, stats = train_local(model, batch, learning_rate=1e-3, bf16=True)
    assert stats.last_loss < stats.first_loss
    assert all(value.dtype == torch.float32 for value in state.values())
