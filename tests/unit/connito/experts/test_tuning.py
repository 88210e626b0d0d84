"""What is trained after pruning: experts alone, towards the experts that they were, and window by window of a task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.experts import tuning
from connito.experts.lowrank import low_rank, sparsify
from connito.experts.measure import loss
from connito.experts.prune import WINDOWS, proficient, progressive
from connito.experts.tuning import distil, expert_error, recover, tune_experts
from connito.moe.layout import require_moe_layers
from connito.moe.rows import fingerprint

from tests.support.models import Sequences


@pytest.fixture(scope="session")
def tiny(distinct_tiny: Path) -> Path:
    """Experts that differ, so that it matters which are left out."""
    return distinct_tiny


def test_the_distance_of_experts_is_the_papers(full: Any) -> None:
    """Mean squares per expert over its own tokens, added up: from the gated MLP's formula."""
    other, generator = copy.deepcopy(full), torch.Generator().manual_seed(2)
    one, two = (require_moe_layers(model)[2] for model in (full, other))
    banks: Any = two.experts
    with torch.no_grad():
        banks.down_proj.mul_(0.9)
    x, ids = torch.randn(20, 64, generator=generator), torch.randint(0, 4, (20, 2), generator=generator)

    def mlp(bank: Any, expert: int, token: torch.Tensor) -> torch.Tensor:
        gate, up = (bank.gate_up_proj[expert] @ token).chunk(2)
        out: torch.Tensor = bank.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
        return out

    want = 0.0
    for expert in range(8):
        own = [t for t in range(20) if expert in ids[t].tolist()]
        if own:
            squares = [(mlp(two.experts, expert, x[t]) - mlp(one.experts, expert, x[t])).square().mean() for t in own]
            want += float(sum(squares)) / len(own)
    with torch.no_grad():
        assert float(expert_error(two, one, x, ids)) == pytest.approx(want, rel=1e-4)
        assert float(expert_error(one, one, x, ids)) == 0.0


def down(layer: Any) -> torch.Tensor:
    bank: torch.Tensor = layer.experts.down_proj
    return bank


@pytest.mark.slow
def test_distillation_brings_a_thinned_model_back_and_keeps_its_zeros(full: Any, sequences: Sequences) -> None:
    text, held = sequences("recipes", 24, 60), sequences("recipes", 8, 61)
    thin = copy.deepcopy(full)
    sparsify(thin, text[:6, :-1], 0.75)
    zeros = {i: down(layer) == 0 for i, layer in require_moe_layers(thin).items()}
    before, digests, plain = loss(thin, held), fingerprint(full), loss(full, held)
    tuned = copy.deepcopy(thin)
    losses = distil(tuned, full, text, 20)
    assert losses[0] == pytest.approx(2 * loss(thin, text[:4]), rel=1e-4), "both parts weigh the same at first"
    assert losses[-1] < losses[0]
    assert loss(tuned, held) < before - 0.3 * (before - plain)
    assert all((down(layer)[zeros[i]] == 0).all() for i, layer in require_moe_layers(tuned).items())
    assert fingerprint(full) == digests, "the teacher was touched"


@pytest.mark.slow
def test_recovery_is_lora_on_the_factors(full: Any, sequences: Sequences) -> None:
    """By autograd through a model whose experts are products of factors and their changes, and torch's own AdamW."""
    text, held = sequences("recipes", 16, 60), sequences("recipes", 8, 61)
    factors, _ = low_rank(full, text[:6, :-1], 0.25)
    before, plain = loss(full, held), copy.deepcopy(full)
    start = {name: factor.clone() for name, factor in factors.items()}
    draw = torch.Generator().manual_seed(0)
    pairs = {}
    for name, factor in start.items():
        width, rank = factor.shape[1], min(8, *factor.shape)
        down_map = ((torch.rand(rank, width, generator=draw) * 2 - 1) / width**0.5).requires_grad_(True)
        pairs[name] = torch.zeros(len(factor), rank, requires_grad=True), down_map

    def whole(name: str) -> torch.Tensor:
        up_map, down_map = pairs[name]
        return torch.addmm(start[name], up_map, down_map, alpha=2.0)

    def experts() -> dict[str, torch.Tensor]:
        return {
            f"model.layers.{layer}.mlp.experts.{bank}": torch.stack(
                [whole(f"layers.{layer}.{bank}.{e}.a") @ whole(f"layers.{layer}.{bank}.{e}.b") for e in range(8)]
            )
            for layer in (2, 3)
            for bank in ("gate_up_proj", "down_proj")
        }

    optimiser = torch.optim.AdamW(
        [part for pair in pairs.values() for part in pair], 1e-3, betas=(0.9, 0.95), weight_decay=0
    )
    for step in range(3):
        ids = torch.from_numpy(text[4 * step : 4 * step + 4].astype("int64"))
        out = torch.func.functional_call(plain, experts(), kwargs={"input_ids": ids[:, :-1], "use_cache": False})
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), ids[:, 1:].flatten()).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    losses = recover(full, factors, text, 3)
    for name in factors:
        torch.testing.assert_close(factors[name], whole(name).detach(), rtol=1e-3, atol=2e-5)
    losses += recover(full, factors, text, 12)
    assert losses[11] < losses[0], "the same batch"
    assert loss(full, held) < before
    for name in (name for name in factors if name.endswith(".a")):
        _, layer, bank, expert, _ = name.split(".")
        row = getattr(full.model.layers[int(layer)].mlp.experts, bank)[int(expert)]
        assert torch.equal(row, factors[name] @ factors[name[:-1] + "b"]), "what is stored is not what runs"


def test_proficiency_has_to_reach_a_rising_share_of_the_best() -> None:
    c = np.array([0.5, 0.1, 0.3, 0.05, 0.05])
    assert proficient(c, 0.0, 1, last=False) == [0, 1, 2, 3, 4]
    assert proficient(c, 0.2, 1, last=False) == [0, 1, 2]
    assert proficient(c, 0.6, 1, last=False) == [0, 2]
    assert proficient(c, 1.0, 2, last=False) == [0, 2]
    assert proficient(c, 0.0, 1, last=True) == [0]


def test_the_schedule_is_that_of_accumulated_gate_shares(full: Any, sequences: Sequences) -> None:
    """The published schedule, written out on the model as it is: without training the shares of every window follow from
    one pass over what is left."""
    text, model = sequences("recipes", 3, 60), copy.deepcopy(full)
    keep, history = progressive(full, text)

    def shares(left: dict[int, list[int]]) -> dict[int, np.ndarray]:
        out = {}
        ids = torch.from_numpy(text[:, :-1].astype("int64"))
        seen: dict[int, torch.Tensor] = {}
        handles = []
        for index, places in left.items():
            router = model.model.layers[index].mlp.gate

            def hook(r: Any, args: Any, output: Any, index: int = index, places: list[int] = places) -> Any:
                chances = (args[0].reshape(-1, 64) @ r.weight.T).softmax(-1)[:, places]
                best = chances.topk(min(2, len(places)), dim=-1)
                gates = torch.zeros_like(chances).scatter(
                    1, best.indices, best.values / best.values.sum(-1, keepdim=True)
                )
                seen[index] = gates
                whole = torch.zeros(len(gates), 8)
                whole[:, places] = gates
                top = whole.topk(2, dim=-1)
                return (output[0], top.values.to(output[1].dtype), top.indices)

            handles.append(router.register_forward_hook(hook))
        with torch.no_grad():
            model.model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        for index, gates in seen.items():
            out[index] = (gates.sum(0) / gates.sum()).double().numpy()
        return out

    left, c = {2: list(range(8)), 3: list(range(8))}, {2: np.zeros(8), 3: np.zeros(8)}
    sizes = [8]
    for window in range(1, WINDOWS + 1):
        if max(map(len, left.values())) == 1:
            break
        now = shares(left)
        for index, places in list(left.items()):
            c[index] += now[index]
            stay = c[index] >= window / WINDOWS * c[index].max()
            if window == WINDOWS:
                stay = np.arange(len(stay)) == c[index].argmax()
            left[index] = [e for e, s in zip(places, stay, strict=True) if s]
            c[index] = c[index][stay]
        if max(map(len, left.values())) != sizes[-1]:
            sizes.append(max(map(len, left.values())))
    assert keep == left
    assert sorted({size for size, _ in history}, reverse=True) == sizes


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "each", "last"), [(40, 4, 20), (43, 4, 23), (7, 1, 2)])
def test_experts_go_in_the_first_half_and_the_last_one_trains_alone_in_the_other(
    full: Any, sequences: Sequences, monkeypatch: pytest.MonkeyPatch, steps: int, each: int, last: int
) -> None:
    trained: list[tuple[int, int]] = []

    def note(model: Any, _: Any, count: int, __: float) -> None:
        trained.append((max(layer.num_experts for layer in require_moe_layers(model).values()), count))

    monkeypatch.setattr(tuning, "tune_experts", note)
    text = sequences("recipes", 3, 60)
    keep, history = tuning.tune_for_task(full, text, text, steps)
    assert [count for _, count in trained[:-1]] == [each] * (len(trained) - 1)
    assert trained[0] == (8, each), "the first window is counted on all experts"
    assert trained[-1] == (1, last), "what is left trains alone"
    assert [left for left, _ in trained] == sorted((left for left, _ in trained), reverse=True)
    assert [len(experts) for experts in keep.values()] == [1, 1]
    assert history[-1][0] == 1


@pytest.mark.slow
def test_training_between_the_windows_keeps_more_of_the_task(full: Any, sequences: Sequences) -> None:
    text, held = sequences("recipes", 24, 60), sequences("recipes", 8, 61)
    plain, tuned = full, copy.deepcopy(full)
    progressive(plain, text[:6])
    progressive(tuned, text[:6], tune=lambda model: tune_experts(model, text, 6))
    assert loss(tuned, held) < loss(plain, held) - 0.02
