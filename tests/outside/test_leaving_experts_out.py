"""Experts pruned, extracted, skipped, grown and composed in every family: it works as transformers has it, or one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.errors import Invalid
from connito.experts import flex
from connito.experts.choose import METHODS, choose
from connito.experts.compose import Composition, Part, base_rows, rows_of
from connito.experts.extraction import extract_domain
from connito.experts.prune import masked, progressive, prune
from connito.experts.routing import Routing, variants_of
from connito.experts.token_skipping import skip_thresholds, skipping
from connito.moe.diagnostics import measure
from connito.moe.layout import require_moe_layers
from connito.moe.resident import compress
from connito.moe.rows import fingerprint, read_rows
from connito.moe.selection import select_experts
from connito.moe.statistics import collect

from tests.outside.test_routing_laws import CASES, EXPERTS, model_of
from tests.support.families import TABLES, logits

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TEXT = np.random.default_rng(0).integers(3, 60, (4, 13)).astype("int32")
# Families whose routers need what one expert cannot give: two a group, or two a token.
TWO_AT_LEAST = {
    "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "exaone_moe",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_linear", "mimo_v2_flash", "nemotron_h", "phimoe", "solar_open",
}  # fmt: skip
# Experts of a group stay together.
GROUPED = {case for case in CASES if "groups" in case}


def refusal(call: Callable[[], Any]) -> str:
    """The sentence that refuses, with the class of the router and what to do instead; empty where the call works."""
    sentence = ""
    try:
        call()
    except Invalid as error:
        sentence = str(error)
    whole = ("Router" in sentence or "Gate" in sentence) and "\n" not in sentence
    assert not sentence or (whole and any(remedy in sentence for remedy in ("; use", "keep more", "; grow"))), sentence
    return sentence


def saved_and_read_by_transformers(model: Any, folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model.save_pretrained(folder)
    return logits(AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager").eval())


@pytest.mark.parametrize("case", CASES)
def test_three_of_six_experts_are_what_transformers_makes_of_them(case: str, tmp_path: Path) -> None:
    """Left out in routing, restricted to in training, and removed: one model."""
    model, kept = model_of(case), [0, 2, 5]
    keep = dict.fromkeys(require_moe_layers(model), kept)

    def seen() -> torch.Tensor:
        with masked(model, keep):
            return logits(model)

    if case in TABLES | GROUPED:
        assert refusal(seen)
        assert refusal(lambda: prune(copy.deepcopy(model), keep))
        return
    pruned = prune(copy.deepcopy(model), keep)
    whole = seen()
    assert not torch.allclose(whole, logits(model), atol=1e-3) or case == "zaya"
    torch.testing.assert_close(logits(pruned), whole, rtol=1e-5, atol=5e-6)
    resident = compress(
        copy.deepcopy(model), dict.fromkeys(keep, kept[:1]), dict.fromkeys(keep, kept[1:]), "restricted"
    )
    torch.testing.assert_close(logits(resident), whole, rtol=1e-5, atol=5e-6)
    torch.testing.assert_close(saved_and_read_by_transformers(pruned, tmp_path), logits(pruned), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if case not in TABLES | GROUPED])
def test_one_expert_a_layer_works_or_says_that_two_are_needed(case: str) -> None:
    model = model_of(case)
    keep = {index: [3] for index in require_moe_layers(model)}

    def alone() -> None:
        with masked(model, keep):
            whole = logits(model)
        torch.testing.assert_close(logits(prune(copy.deepcopy(model), keep)), whole, rtol=1e-5, atol=5e-6)

    assert bool(refusal(alone)) == (CASES[case][0] in TWO_AT_LEAST)


@pytest.mark.parametrize("case", CASES)
def test_every_way_of_leaving_experts_out(case: str) -> None:
    model = model_of(case)
    layers = len(require_moe_layers(model))
    for method in METHODS:
        refused = refusal(partial(choose, model, TEXT, method, max_experts=4 * layers))
        assert bool(refused) == (case in TABLES | GROUPED)
    if case not in TABLES | GROUPED:
        assert progressive(copy.deepcopy(model), TEXT, 2)[1][-1][0] == 2
        found = extract_domain(model, TEXT, TEXT, margin=10.0)
        assert found.kept == layers * (2 if CASES[case][0] in TWO_AT_LEAST else 1)


@pytest.mark.parametrize("case", CASES)
def test_skipping_gives_a_token_what_the_family_gives_to_its_heavier_experts(case: str) -> None:
    """In the lowest layer: a token that keeps m experts has the weights of the family's model with m experts a token."""
    model = model_of(case)
    with skipping(model, 0.0) as none:
        assert torch.equal(logits(model), logits(model_of(case)))
    assert none.skipped == 0
    if case in TABLES:
        with skipping(model, 1.0):
            assert refusal(partial(logits, model))
        return
    betas = skip_thresholds(model, TEXT[:, :-1])
    plain, lighter = reported(model, None), reported(model, betas)
    heavy = plain[0].abs()
    beta = betas[min(betas)]
    kept = (heavy >= beta * heavy.max(-1, keepdim=True).values).sum(-1)
    assert torch.equal((lighter[0] != 0).sum(-1), torch.where((plain[0] != 0).any(-1), kept, 0))
    for number in {int(n) for n in kept} - {plain[0].shape[-1]}:
        fewer = copy.deepcopy(model_of(case, number))
        fewer.load_state_dict(model.state_dict())
        (weights, ids), rows = reported(fewer, None), kept == number
        # With a bias the heaviest are not always the first that the family chooses: those rows are another choice.
        wanted, got = (table(w, i)[rows] for w, i in ((weights, ids), lighter))
        same = ((wanted != 0) == (got != 0)).all(-1)
        torch.testing.assert_close(got[same], wanted[same], rtol=1e-5, atol=1e-6)


def reported(model: Any, betas: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate weights and expert ids [T, k] in the lowest layer, skipping below `betas`."""
    layers = require_moe_layers(model)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    with skipping(model, betas or 0.0):
        hook = layers[min(layers)].router.register_forward_hook(lambda _m, _a, out: seen.append(out[1:3]))
        logits(model)
        hook.remove()
    return seen[0]


def table(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return weights.new_zeros(len(weights), EXPERTS + 1).scatter_add_(1, ids, weights)


@pytest.mark.parametrize("beta", [0.6, 0.8, 1.0])
def test_skipping_on_mixtral_is_the_published_rule(beta: float) -> None:
    """w₂ < β w₁: the second is dropped, the first gets all (NAEE, section 3.3): written anew, on the layer's own tensors."""
    model = model_of("mixtral", 2)
    layers = require_moe_layers(model)
    low: Any = layers[min(layers)]
    seen: list[Any] = []
    hooks = [low.router.register_forward_hook(lambda _m, a, _o: seen.append(a[0].reshape(-1, a[0].shape[-1])))]
    hooks += [low.experts.register_forward_hook(lambda _m, _a, out: seen.append(out))]
    with skipping(model, beta):
        logits(model)
    for hook in hooks:
        hook.remove()
    x, out = seen
    shares = (x @ low.router.weight.T).float().softmax(-1)
    top, ids = shares.sort(-1, descending=True)
    first, second = top[:, 0], torch.where(top[:, 1] < beta * top[:, 0], 0.0, top[:, 1])
    assert (second == 0).any()
    expected = torch.zeros_like(out)
    for slot, weight in enumerate((first, second)):
        for token, expert in enumerate(ids[:, slot].tolist()):
            gate, up = (x[token] @ low.experts.gate_up_proj[expert].T).chunk(2)
            y = (torch.nn.functional.silu(gate) * up) @ low.experts.down_proj[expert].T
            expected[token] += y * weight[token] / (first + second)[token]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_expert_is_added_and_taken_out_again_or_the_family_is_refused(case: str, tmp_path: Path) -> None:
    model = model_of(case)
    batches = np.stack([TEXT, TEXT])
    if case in TABLES | GROUPED:
        assert refusal(partial(flex.grow, model, "new", batches, TEXT[:, :-1], learning_rate=1e-3))
        return
    addition = flex.grow(model, "new", batches, TEXT[:, :-1], learning_rate=1e-3)
    grown = copy.deepcopy(model)
    ids = flex.opt_in(grown, [addition])
    torch.testing.assert_close(saved_and_read_by_transformers(grown, tmp_path), logits(grown), rtol=1e-6, atol=1e-6)
    flex.opt_out(grown, ids, ["new"])
    assert torch.equal(logits(grown), logits(model))


@pytest.mark.parametrize("case", [case for case in CASES if case not in GROUPED])
def test_experts_are_composed_routed_and_selected(case: str) -> None:
    model = copy.deepcopy(model_of(case))
    before, top = fingerprint(model), max(require_moe_layers(model))
    layers = {top: [0, 2]}
    state = {name: rows + 0.01 for name, rows in read_rows(model, layers).items()}
    one = Part("one", "d" * 64, rows_of(layers, state))
    two = Part("two", "e" * 64, rows_of(layers, {name: rows - 0.02 for name, rows in state.items()}))
    base = base_rows(model, [one, two])
    with variants_of(model, [one, two], base, Routing.make("one-hot:0", model, [one, two], base)):
        alone = logits(model)
    composed = Composition(model)
    composed.add(one)
    torch.testing.assert_close(logits(model), alone, rtol=1e-5, atol=1e-5)
    assert len(composed.verify()) == 2 * len(require_moe_layers(model)[top].parameters)
    composed.remove("one")
    assert fingerprint(model) == before
    chosen = select_experts(collect(model, TEXT[:, :-1]), "esft-gate", 0.2)
    assert set(measure(model, chosen.layers, TEXT, budget=2)) >= {"causal_effect", "drivers"}
