from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from connito.errors import Invalid, Retry
from connito.moe.evaluate import Evaluator
from connito.moe.routed import routed_tokens
from connito.moe.rows import fingerprint, write_rows

SELECTION = {3: [0, 5]}


def plain(model: Any, table: Any) -> Any:
    ids = torch.from_numpy(table).long()
    with torch.no_grad():
        scores = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)
    return -scores.gather(-1, ids[:, 1:, None]).squeeze(-1).double().sum(1).numpy()


def other_state(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: rows + 0.05 * torch.randn(rows.shape, generator=draw) for name, rows in base.items()}


def test_losses_equal_a_plain_forward_for_every_state(full: Any, sequences: Any) -> None:
    judge = Evaluator(full, SELECTION, batch_tokens=150)
    assert judge._shortcut is not None
    text = sequences("logs", 5, 1)
    for state in (judge.base, other_state(judge.base, 1), other_state(judge.base, 2), judge.base):
        sums, tokens = judge.losses(state, text)
        write_rows(full, SELECTION, state)
        np.testing.assert_allclose(sums, plain(full, text), rtol=1e-5)
        assert tokens.tolist() == [64] * 5
        assert sums.dtype == np.float64


def test_hidden_states_are_computed_once_and_the_cache_is_bounded(full: Any, sequences: Any) -> None:
    text = sequences("logs", 4, 1)
    calls: list[int] = []
    full.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *_: calls.append(1))
    judge = Evaluator(full, SELECTION)
    judge.warm(text)
    calls.clear()
    first, _ = judge.losses(judge.base, text)
    again, _ = judge.losses(other_state(judge.base, 1), text)
    assert not calls, "layers below the first adapted one ran again"
    assert not np.array_equal(first, again)
    small = Evaluator(full, SELECTION, cache_bytes=2 * 64 * 64 * 4)
    np.testing.assert_allclose(small.losses(judge.base, text)[0], first, rtol=1e-6)
    assert len(small._cache) == 2


def test_hidden_states_of_another_cycle_go_only_where_they_take_the_room(full: Any, sequences: Any) -> None:
    text = sequences("logs", 4, 1)
    for room, kept in ((2 * 4, 4), (2 * 4 - 1, 1)):
        judge = Evaluator(full, SELECTION, cache_bytes=room * 64 * 64 * 4)
        judge.warm(text)
        judge.keep_only(text[:1])
        assert len(judge._cache) == kept


def test_losses_do_not_depend_on_what_was_drawn_before(full: Any, sequences: Any) -> None:
    """Validators have scored other sequences than an auditor, and keep the hidden states of those."""
    text = np.concatenate([sequences("logs", 24, 1), sequences("recipes", 24, 2)])
    cold = Evaluator(full, SELECTION).losses(None, text)[0]
    for drawn in (range(3), range(1, 48, 2), [0, 47], range(5, 40)):
        judge = Evaluator(full, SELECTION)
        judge.warm(text[list(drawn)])
        np.testing.assert_array_equal(judge.losses(None, text)[0], cold)


def test_restoring_leaves_the_model_as_it_was(full: Any, sequences: Any) -> None:
    before = fingerprint(full)
    judge = Evaluator(full, SELECTION)
    judge.losses(other_state(judge.base, 1), sequences("logs", 2, 1))
    assert fingerprint(full) != before
    judge.restore()
    assert fingerprint(full) == before


def test_non_finite_states_give_non_finite_losses_and_nothing_sticks(full: Any, sequences: Any) -> None:
    text = sequences("logs", 2, 1)
    judge = Evaluator(full, {2: list(range(8))})
    good, _ = judge.losses(judge.base, text)
    broken, _ = judge.losses({name: rows * float("nan") for name, rows in judge.base.items()}, text)
    assert not np.isfinite(broken).any()
    np.testing.assert_array_equal(judge.losses(judge.base, text)[0], good)


def test_what_does_not_fit_is_refused_before_the_model_changes(full: Any, sequences: Any) -> None:
    judge = Evaluator(full, SELECTION)
    before = fingerprint(full)
    with pytest.raises(Invalid, match="missing"):
        judge.losses({}, sequences("logs", 1, 1))
    with pytest.raises(Invalid, match="shape"):
        judge.losses({name: rows[:1] for name, rows in judge.base.items()}, sequences("logs", 1, 1))
    with pytest.raises(Invalid, match="L"):
        judge.losses(judge.base, np.zeros((1, 1), dtype=np.int32))
    assert fingerprint(full) == before
    with pytest.raises(Invalid, match="empty"):
        Evaluator(full, {})


def test_batches_side_by_side_give_what_one_after_the_other_does(full: Any, sequences: Any, threads: int) -> None:
    text = sequences("logs", 7, 1)
    alone = Evaluator(full, SELECTION, batch_tokens=10**6)
    judge = Evaluator(full, SELECTION, batch_tokens=150)
    began: set[int] = set()
    meet = threading.Barrier(threads)

    def arrive(*_: Any) -> None:
        if (me := threading.get_ident()) not in began:
            began.add(me)
            meet.wait(60)

    top = full.get_submodule("model.layers.3.mlp")
    for state in (judge.base, other_state(judge.base, 1)):
        expected = alone.losses(state, text)[0]
        began.clear()
        handle = top.register_forward_pre_hook(arrive)
        seen = list[tuple[int, int]]()
        found, _ = judge.losses(state, text, lambda *progress, seen=seen: seen.append(progress))
        handle.remove()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert len(began) == threads, "the batches did not run at once"
        assert seen == [(2, 7), (4, 7), (6, 7), (7, 7)]
        assert torch.get_num_threads() == threads
    assert "forward" not in full.get_submodule("model.layers.0").__dict__
    np.testing.assert_allclose(plain(full, text), found, rtol=1e-5)


def test_few_sequences_and_heads_of_their_own_run_one_after_the_other(full: Any, sequences: Any, threads: int) -> None:
    judge = Evaluator(full, SELECTION)
    for most, side in ((10**6, 1), (256, 2), (64, threads)):
        judge._batch_tokens = most
        with judge._side_by_side(4 * 64) as (found, _):
            assert found == side
    torch.set_num_threads(16)
    with judge._side_by_side(10**9) as (found, _):
        assert found == 4, "each takes memory of its own"
    judge._head.output = None
    with judge._side_by_side(10**9) as (found, _):
        assert found == 1


def test_what_stops_a_measurement_stops_it_side_by_side(full: Any, sequences: Any, threads: int) -> None:
    judge, text = Evaluator(full, SELECTION, batch_tokens=64), sequences("logs", 9, 1)

    def stop(*_: Any) -> None:
        raise Retry("stopped")

    with pytest.raises(Retry, match="stopped"):
        judge.losses(judge.base, text, stop)
    np.testing.assert_allclose(judge.losses(judge.base, text)[0], plain(full, text), rtol=1e-5)
    assert torch.get_num_threads() == threads


def test_tokens_are_routed_alike_from_the_first_adapted_layer_on(full: Any, sequences: Any, threads: int) -> None:
    judge, text, calls = Evaluator(full, SELECTION, batch_tokens=64), sequences("logs", 9, 1), list[int]()
    whole = routed_tokens(full, SELECTION, text)
    with judge.begun(text):
        handle = full.get_submodule("model.layers.0.mlp").register_forward_hook(lambda *_: calls.append(1))
        assert routed_tokens(full, SELECTION, text) == whole
        handle.remove()
    assert not calls, "layers below the first adapted one ran again"
    assert not judge._cache
