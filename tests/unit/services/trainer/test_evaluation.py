"""A miner measures itself on text that it does not train on, and stops when that no longer helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.base.loading import load_full, load_resident_local
from connito.data.corpus import ENDS, WHOLE, Corpus
from connito.data.packing import Rows, pack
from connito.moe.evaluate import Evaluator
from connito.moe.resident import compress, read_targets
from connito.moe.training import train_local

from services.trainer.evaluation import Evaluation, hold_back
from services.trainer.settings import TrainerSettings

LAYERS, REST = {1: [1, 6]}, {1: [0, 2, 3, 4, 5, 7]}


def settings(**fields: Any) -> TrainerSettings:
    return TrainerSettings.model_validate({"key_file": "k", **fields})


def rows(count: int, seed: int = 0, length: int = 12) -> Rows:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 40, length + 1).tolist() for _ in range(count)]
    masks = [[place > 3 for place in range(length + 1)] for _ in range(count)]
    return pack(Corpus.from_masked(zip(ids, masks, strict=True), {ENDS: WHOLE}), length)


def test_what_is_held_back_is_not_trained_on() -> None:
    batches = rows(40).reshape(10, 4, -1)
    kept, apart = hold_back(batches, 0.1)
    assert kept.shape == batches.shape
    assert len(apart) == 4
    own = {row.tobytes() for row in kept.reshape(-1, kept.shape[-1])}
    assert len(own) == 36
    assert not own & {row.tobytes() for row in apart}
    for share, total in ((0.0, 40), (0.09, 40), (0.1, 39)):
        whole = rows(total).reshape(1, total, -1)
        kept, apart = hold_back(whole, share)
        assert (len(apart), kept is whole) == (0, True)


def test_losses_are_those_of_the_training_model_on_what_counts(random_base: Path) -> None:
    model = compress(load_full(random_base), LAYERS, REST)
    table = rows(5, seed=1)
    sums, tokens = Evaluator(load_full(random_base), LAYERS).losses(None, table)
    for micro in (0, 2):
        own = Evaluation(model, table, 10, settings(micro_batch=micro))
        assert own.losses == [pytest.approx(float(sums.sum() / tokens.sum()), rel=1e-5)]
    assert Evaluation(model, table[:0], 10, settings()).losses == []


def test_weights_in_bfloat16_are_measured_too(random_base: Path) -> None:
    table = rows(5, seed=1)
    whole = Evaluation(compress(load_full(random_base), LAYERS, REST), table, 10, settings())
    model = load_resident_local(random_base, LAYERS, REST, half=True)
    own = Evaluation(model, table, 10, settings(bf16_parameters=True))
    assert own.losses == [pytest.approx(whole.losses[0], rel=0.02)]


def trained(base: Path, rate: float, **fields: Any) -> tuple[Any, Evaluation, int]:
    model = compress(load_full(base), LAYERS, REST)
    own = Evaluation(model, rows(4, seed=7), 10, settings(**fields))
    state, stats = train_local(
        model, np.resize(rows(4, seed=3), (10, 4, 13)), learning_rate=rate, on_step=own, should_stop=lambda: own.stopped
    )
    return (own.best if own.stopped else state), own, stats.steps


def test_training_ends_when_it_does_not_help_and_gives_the_best_state(random_base: Path) -> None:
    """Random tokens: whatever is learned of some does not hold for others."""
    state, own, steps = trained(random_base, 0.3, patience=2)
    assert own.stopped
    assert steps < 10
    model = compress(load_full(random_base), LAYERS, REST)
    best = min(own.losses)
    from connito.moe.resident import write_targets

    write_targets(model, state)
    assert Evaluation(model, rows(4, seed=7), 10, settings()).losses == [pytest.approx(best, rel=1e-6)]
    again, other, _ = trained(random_base, 0.3, patience=2)
    assert other.losses == own.losses
    assert all(state[name].equal(again[name]) for name in state)


def test_without_patience_it_only_looks(random_base: Path) -> None:
    plain = compress(load_full(random_base), LAYERS, REST)
    train_local(plain, np.resize(rows(4, seed=3), (10, 4, 13)), learning_rate=0.3)
    state, own, steps = trained(random_base, 0.3, patience=0)
    assert (steps, own.stopped, own.best) == (10, False, None)
    assert len(own.losses) == 6
    want = read_targets(plain)
    assert all(state[name].equal(want[name]) for name in want), "looking changes nothing"
