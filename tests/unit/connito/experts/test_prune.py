"""Experts left out: the choice is the best there is, seen and real pruning agree, and keeping all changes nothing."""

from __future__ import annotations

import weakref
from itertools import combinations
from pathlib import Path
from typing import Any

import connito.experts.choose as choose_module
import pytest
import torch
from connito.errors import Invalid
from connito.experts.choose import choose, deal, expert_bytes, expert_costs, naee
from connito.experts.measure import loss
from connito.experts.prune import WINDOWS, masked, progressive, prune
from connito.experts.tape import Tape, each_layer
from connito.experts.token_skipping import skip_thresholds, skipping
from connito.moe.layout import find_moe_layers
from connito.moe.rows import fingerprint
from hypothesis import given
from hypothesis import strategies as st
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM

from tests.support.models import Sequences

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def tiny(distinct_tiny: Path) -> Path:
    """Experts that differ, so that it matters which are left out."""
    return distinct_tiny


ALL = {2: list(range(8)), 3: list(range(8))}
KEEP = {2: [0, 3, 5], 3: [1, 2, 6]}


def mixtral() -> Any:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_local_experts=6,
                      num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=2)
    ).eval()  # fmt: skip


def olmoe() -> Any:
    torch.manual_seed(0)
    return OlmoeForCausalLM(
        OlmoeConfig(vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_experts=6,
                    num_experts_per_tok=3, num_attention_heads=2, num_key_value_heads=2, norm_topk_prob=False,
                    pad_token_id=None, eos_token_id=None)
    ).eval()  # fmt: skip


def test_keeping_every_expert_changes_nothing(full: Any, logits: Any) -> None:
    plain, before = logits(full), fingerprint(full)
    with masked(full, ALL):
        assert torch.equal(logits(full), plain)
    prune(full, ALL)
    assert fingerprint(full) == before
    assert torch.equal(logits(full), plain)


def test_masking_leaves_no_trace_and_equals_removal(full: Any, logits: Any) -> None:
    plain = logits(full)
    with masked(full, KEEP):
        seen = logits(full)
    assert torch.equal(logits(full), plain)
    assert not torch.equal(seen, plain)
    prune(full, KEEP)
    torch.testing.assert_close(logits(full), seen, rtol=1e-5, atol=1e-5)
    assert {layer.num_experts for layer in find_moe_layers(full).values()} == {3}
    assert full.config.num_experts == 3


@pytest.mark.parametrize("build", [mixtral, olmoe])
def test_other_families_prune_alike(build: Any, logits: Any) -> None:
    model = build()
    keep = {0: [0, 2, 5], 1: [1, 3, 4]}
    with masked(model, keep):
        seen = logits(model)
    assert torch.allclose(logits(prune(model, keep)), seen, atol=1e-6)


def test_fewer_experts_than_slots_lower_top_k(full: Any, logits: Any) -> None:
    with masked(full, {2: [4], 3: [0]}):
        seen = logits(full)
    prune(full, {2: [4], 3: [0]})
    torch.testing.assert_close(logits(full), seen, rtol=1e-5, atol=1e-5)
    assert full.config.num_experts_per_tok == 1


def test_the_layer_error_is_that_of_the_real_layer(full: Any, sequences: Sequences) -> None:
    """What the search minimises is what the pruned layer does."""
    tape = each_layer(full, sequences("recipes", 2, 60)[:, :-1], lambda tape: tape)[2]
    keep = [1, 4, 6]
    block = full.model.layers[2].mlp
    with torch.inference_mode():
        whole = block(tape.inputs[None])[0]
        with masked(full, {2: keep}):
            part = block(tape.inputs[None])[0]
    assert tape.error(list(range(8))) == pytest.approx(0, abs=1e-4)
    assert tape.error(keep) == pytest.approx(float((whole - part).norm()), rel=1e-3)


def test_one_layer_is_in_memory_at_a_time(full: Any, sequences: Sequences) -> None:
    """When a layer is looked at, what the layer before had is gone."""
    alive: list[Any] = []

    def look(tape: Tape) -> int:
        assert all(outputs() is None for outputs in alive)
        alive.append(weakref.ref(tape.outputs))
        return len(tape.outputs)

    assert each_layer(full, sequences("recipes", 2, 60)[:, :-1], look) == {2: 8, 3: 8}
    assert len(alive) == 2


def test_naee_finds_the_best_subset_and_greedy_is_no_better(
    full: Any, sequences: Sequences, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = each_layer(full, sequences("recipes", 2, 60)[:, :-1], lambda tape: tape)[3]
    best = naee(tape, 3)
    assert tape.error(best) == min(tape.error(list(c)) for c in combinations(range(8), 3))
    monkeypatch.setattr(choose_module, "EXACT_SUBSETS", 1)
    greedy = naee(tape, 3)
    assert len(greedy) == 3
    assert tape.error(greedy) >= tape.error(best)
    assert naee(tape, 8) == list(range(8))


@pytest.mark.parametrize("method", ["naee", "router-weighted", "moe-i2"])
def test_budgets_are_met_in_experts_and_bytes(full: Any, sequences: Sequences, method: Any) -> None:
    text = sequences("recipes", 3, 60)
    by_count = choose(full, text, method, max_experts=7)
    size = expert_bytes(find_moe_layers(full)[2])
    by_bytes = choose(full, text, method, max_bytes=7 * size + size // 2)
    assert by_bytes == by_count
    assert 2 <= sum(map(len, by_count.values())) <= 7
    assert all(experts == sorted(set(experts)) and experts for experts in by_count.values())
    if method != "naee":
        assert sum(map(len, by_count.values())) == 7


def test_pruning_for_a_domain_beats_pruning_the_other_way_round(full: Any, sequences: Sequences) -> None:
    text, held = sequences("recipes", 4, 60), sequences("recipes", 4, 61)
    for method in ("naee", "router-weighted"):
        keep = choose(full, text, method, max_experts=6)
        worst = {index: [e for e in range(8) if e not in experts][:3] for index, experts in keep.items()}
        with masked(full, keep):
            good = loss(full, held)
        with masked(full, worst):
            bad = loss(full, held)
        assert good < bad - 0.05


def test_budgets_that_cannot_be_met_and_nonsense_are_refused(full: Any, sequences: Sequences) -> None:
    text = sequences("recipes", 1, 60)
    with pytest.raises(Invalid, match="need one each"):
        choose(full, text, max_experts=1)
    with pytest.raises(Invalid, match="need one each"):
        choose(full, text, max_bytes=10)
    with pytest.raises(Invalid, match="unknown pruning method"):
        choose(full, text, "lottery", max_experts=4)
    wrong: list[dict[int, list[int]]] = [{2: []}, {2: [8]}, {2: [1, 0]}, {7: [0]}]
    for keep in wrong:
        with pytest.raises(Invalid, match="cannot keep"):
            prune(full, keep)


def test_costs_are_those_of_leaving_one_out(full: Any, sequences: Sequences) -> None:
    text = sequences("recipes", 1, 60)
    costs = expert_costs(full, text)
    whole, rises = loss(full, text), []
    for expert in range(8):
        with masked(full, {3: [e for e in range(8) if e != expert]}):
            rises.append(max(0.0, loss(full, text) - whole))
    assert costs[3] == pytest.approx(rises)


@given(st.dictionaries(st.integers(0, 9), st.floats(0, 10), min_size=1, max_size=6), st.data())
def test_every_place_is_dealt_within_bounds(costs: Any, data: Any) -> None:
    totals = {index: data.draw(st.integers(1, 8)) for index in costs}
    budget = data.draw(st.integers(len(costs), 50))
    counts = deal(costs, totals, budget)
    assert sum(counts.values()) == min(budget, sum(totals.values()))
    assert all(1 <= counts[index] <= totals[index] for index in costs)


def test_progressive_pruning_ends_with_one_expert_and_its_ids_are_the_bases(
    full: Any, tiny: Path, sequences: Sequences, logits: Any
) -> None:
    from connito.base.loading import load_full

    tuned = []
    keep, history = progressive(full, sequences("recipes", 3, 60), tune=lambda _: tuned.append(1))
    sizes = [size for size, _ in history]
    assert (sizes[0], sizes[-1]) == (8, 1)
    assert sizes == sorted(sizes, reverse=True)
    assert 1 <= len(tuned) <= WINDOWS
    assert all(len(experts) == 1 for experts in keep.values())
    again = load_full(tiny)
    with masked(again, keep):
        assert torch.equal(logits(again), logits(full))


def test_skipping_nothing_is_the_model_itself(full: Any, logits: Any) -> None:
    plain = logits(full)
    with skipping(full, 0.0) as count:
        assert torch.equal(logits(full), plain)
    assert count.share == 0
    assert torch.equal(logits(full), plain)


def test_skipping_everything_but_the_first_is_top_1(full: Any, tiny: Path, logits: Any) -> None:
    from connito.base.loading import load_full

    with skipping(full, 1.1) as count:
        seen = logits(full)
    assert count.share == 1.0 or seen is not None
    one = load_full(tiny)
    layer: Any
    for layer in find_moe_layers(one).values():
        layer.router.top_k = 1
    with skipping(full, 0.9999999) as count:
        torch.testing.assert_close(logits(full), logits(one), rtol=1e-4, atol=1e-4)
    assert count.share == pytest.approx(0.5, abs=0.01)


def test_the_median_threshold_skips_about_half_of_the_second_experts(full: Any, sequences: Sequences) -> None:
    text = sequences("recipes", 4, 60)
    betas = skip_thresholds(full, text[:, :-1])
    assert all(0 < beta < 1 for beta in betas.values())
    with skipping(full, betas) as count:
        skipped = loss(full, text)
    assert 0.2 < count.share < 0.3
    assert skipped < loss(full, text) + 0.5
