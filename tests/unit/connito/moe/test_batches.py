"""Packed documents through the project's training and evaluation, beside each document alone through plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.loading import load_full
from connito.data.corpus import ENDS, WHOLE, Corpus
from connito.data.packing import counted, pack
from connito.moe.batches import batch_of, mixed, separates
from connito.moe.diagnostics import causal_effects, top1_ratio
from connito.moe.evaluate import Evaluator
from connito.moe.head import Head
from connito.moe.prefix import Beginnings
from connito.moe.resident import compress, target_parameters
from connito.moe.routed import routed_tokens
from connito.moe.statistics import collect
from connito.moe.training import train_local
from numpy.typing import NDArray
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from tests.support.families import FAMILIES, SMALL, tiny_model
from tests.support.models import save_random

pytestmark = pytest.mark.slow
LAYERS = {1: [0, 3], 2: [5]}
HYBRID: dict[str, Any] = {
    "initializer_range": 0.2,
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "shared_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    "layer_types": ["mamba", "attention", "mamba"],
}  # fmt: skip
CONVOLVED: dict[str, Any] = {
    "initializer_range": 0.2,
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1,
    "layer_types": ["conv", "full_attention", "conv"],
}  # fmt: skip
DEEP: dict[str, Any] = {
    "initializer_range": 0.05,
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "num_hidden_layers": 24,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
    "shared_expert_intermediate_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("random"), initializer_range=0.2)


def documents(count: int, vocabulary: int, seed: int = 0) -> Corpus:
    """Documents of 2 to 20 tokens with a part in front that does not count."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, vocabulary, int(rng.integers(2, 21))).tolist() for _ in range(count)]
    masks = [[place >= len(part) // 3 for place in range(len(part))] for part in ids]
    return Corpus.from_masked(zip(ids, masks, strict=True), {ENDS: WHOLE})


def plain_losses(model: Any, corpus: Corpus) -> tuple[torch.Tensor, int]:
    """The sum over documents of transformers' own loss with labels of −100 outside of what counts, and how many count."""
    total, number = torch.zeros(()), 0
    for index in range(corpus.documents):
        ids = torch.from_numpy(corpus.document(index).astype(np.int64))[None]
        assert corpus.loss is not None
        mask = torch.tensor(corpus.loss[corpus.offsets[index] : corpus.offsets[index + 1]].tolist())[None]
        labels = ids.masked_fill(~mask, -100)
        here = int((labels[:, 1:] != -100).sum())
        if here:
            total = total + model(input_ids=ids, labels=labels, use_cache=False).loss * here
            number += here
    return total, number


def all_models(base: Path) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "attention": load_full(base),
        "states": GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**HYBRID)).eval(),
        "convolutions": Lfm2MoeForCausalLM(Lfm2MoeConfig(**CONVOLVED)).eval(),
    }


def test_a_family_is_asked_whether_it_keeps_documents_apart(base: Path) -> None:
    found = {name: separates(model) for name, model in all_models(base).items()}
    assert found == {"attention": True, "states": False, "convolutions": False}


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_a_family_is_asked_in_bfloat16_too(base: Path, weights: torch.dtype) -> None:
    """Where a deep model computes in a shorter type than it is stored in, rounding must not pass for mixing."""
    torch.manual_seed(2)
    deep = Qwen2MoeForCausalLM(Qwen2MoeConfig(**DEEP)).eval()
    with torch.no_grad():
        for parameter in deep.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    models = {**all_models(base), "deep attention": deep}
    with mixed(torch.device("cpu"), bf16=True):
        found = {name: separates(model.to(weights)) for name, model in models.items()}
    assert found == {"attention": True, "deep attention": True, "states": False, "convolutions": False}


@pytest.mark.parametrize("name", ["attention", "states", "convolutions"])
def test_losses_and_gradients_of_packed_rows_are_those_of_each_document_alone(base: Path, name: str) -> None:
    model = all_models(base)[name]
    model.requires_grad_(True)
    corpus = documents(14, 60)
    want, tokens = plain_losses(model, corpus)
    (want / tokens).backward()  # type: ignore[no-untyped-call]
    gradients = {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    rows = pack(corpus, 24)
    assert (rows["position"][:, 1:] == 0).any(), "rows hold several documents"
    batch = batch_of(rows, model)
    assert batch.tokens == tokens == counted(rows).sum()
    loss = Head(model).nll(*batch).sum()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-5)
    (loss / tokens).backward()  # type: ignore[no-untyped-call]
    for key, value in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(value.grad, gradients[key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_training_step_is_the_step_on_each_document_alone(base: Path) -> None:
    """Micro-batches hold unequal numbers of what counts and must weigh by it."""
    everything = {layer: [e for e in range(8) if e not in experts] for layer, experts in LAYERS.items()}
    corpus = documents(12, 250, seed=3)
    by_hand = compress(load_full(base), LAYERS, everything)
    parameters = target_parameters(by_hand)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    total, tokens = plain_losses(by_hand, corpus)
    (total / tokens).backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimiser.step()
    rows = pack(corpus, 24)
    for micro, keeps in ((0, False), (1, False), (2, False), (2, True)):
        model = compress(load_full(base), LAYERS, everything)
        beginnings = Beginnings(model, bf16=False)
        if keeps:
            with beginnings.keep(rows):
                routed_tokens(model, LAYERS, rows)
        state, stats = train_local(model, rows[None], learning_rate=1e-3, micro_batch=micro, beginnings=beginnings)
        assert stats.first_loss == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
        for key, value in parameters.items():
            torch.testing.assert_close(state[key], value.detach(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["attention", "states", "convolutions"])
def test_held_out_losses_are_those_of_each_document_alone(base: Path, name: str) -> None:
    model = all_models(base)[name]
    corpus = documents(14, 60, seed=5)
    with torch.no_grad():
        want, tokens = plain_losses(model, corpus)
    rows = pack(corpus, 24)
    judge = Evaluator(model, {max(LAYERS): [0]}, batch_tokens=60, cache_bytes=1 << 13)
    for _ in ("fresh", "from the cache"):
        sums, counts = judge.losses(None, rows)
        assert counts.tolist() == counted(rows).tolist()
        assert float(sums.sum()) == pytest.approx(float(want), rel=1e-5)
        assert int(counts.sum()) == tokens
    judge.keep_only(rows[:1])
    again, _ = judge.losses(None, rows)
    np.testing.assert_allclose(again, sums, rtol=1e-6)


def routed(model: Any, table: NDArray[Any]) -> dict[int, list[int]]:
    return {index: layer.counts.tolist() for index, layer in collect(model, table).layers.items()}


@pytest.mark.parametrize("name", ["attention", "states", "convolutions"])
def test_routing_counts_text_alone_and_document_by_document(base: Path, name: str) -> None:
    model = all_models(base)[name]
    corpus = documents(10, 60, seed=7)
    together = routed(model, pack(corpus, 24))
    alone: dict[int, Any] = {}
    for index in range(corpus.documents):
        for layer, counts in routed(model, corpus.document(index)[None]).items():
            alone[layer] = np.add(alone.get(layer, 0), counts)
    assert together == {layer: counts.tolist() for layer, counts in alone.items()}


def test_diagnostics_take_packed_rows(base: Path) -> None:
    model = load_full(base)
    corpus = documents(10, 250, seed=9)
    rows = pack(corpus, 24)
    long = pack(corpus, 300)
    assert top1_ratio(model, rows) == pytest.approx(top1_ratio(model, long), rel=1e-5)
    one, other = (causal_effects(model, LAYERS, table) for table in (rows, long))
    assert one[1] == pytest.approx(other[1], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_mixes_documents(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sparse attention breaks ties by how long the row is, padding included: here it may look at everything.
    monkeypatch.setitem(SMALL, "index_topk", 64)
    model = tiny_model(family)
    corpus = documents(6, 60, seed=11)
    with torch.no_grad():
        want, tokens = plain_losses(model, corpus)
        batch = batch_of(pack(corpus, 30), model)
        found = Head(model).nll(*batch).sum()
    assert batch.tokens == tokens
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-3)


def test_a_model_that_keeps_documents_apart_in_one_row_alone_does_not_count(base: Path) -> None:
    model: Any = load_full(base)
    inner = model.model.forward

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **options: Any) -> Any:
        return inner(input_ids=input_ids, position_ids=position_ids if len(input_ids) == 1 else None, **options)

    model.model.forward = forward
    assert not separates(model)
    corpus = documents(8, 60)
    want, _ = plain_losses(model, corpus)
    torch.testing.assert_close(Head(model).nll(*batch_of(pack(corpus, 24), model)).sum(), want, rtol=1e-5, atol=1e-5)
