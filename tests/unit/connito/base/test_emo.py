"""Document pools: what they restrict, and that a subset can be taken out of a base that learned in them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.emo import document_pools, train_pooled
from connito.base.tiny import DOMAINS, blocks, pretrain, tiny_texts
from connito.base.upcycle import upcycle
from connito.errors import Invalid
from connito.experts.extraction import extract_domain
from connito.moe.batches import separates
from connito.moe.statistics import collect
from connito.runtime.progress import silent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start() -> Any:
    """A tiny upcycled model, little trained."""
    torch.manual_seed(0)
    dense = pretrain(0, 40, silent)
    texts = {domain: blocks(tiny_texts(domain, 0, 24))[:12] for domain in DOMAINS}
    held = blocks(tiny_texts("logs", 1, 2))
    model = upcycle(dense, texts, held, moe_layers=2, experts=8, top_k=2).model
    # Whether documents of a row are kept apart is measured once, by passes of its own that would count as documents.
    separates(model)
    return model


def table(domain: str, seed: int) -> Any:
    return blocks(tiny_texts(domain, seed, 30)).numpy().astype(np.int32)[:8]


def test_a_documents_tokens_keep_to_its_pool_and_a_full_pool_changes_nothing(start: Any) -> None:
    documents = torch.cat([blocks(tiny_texts(domain, 3, 4))[:2] for domain in DOMAINS])
    for row in documents:
        with document_pools(start, 3) as terms:
            counted = collect(start, row[None].numpy().astype("int32"))
        assert len(terms) == 2
        assert all((layer.counts > 0).sum() <= 3 for layer in counted.layers.values())
    with torch.no_grad(), document_pools(start, 8) as terms:
        free = start(input_ids=documents).logits
        assert len(terms) == 2
    torch.testing.assert_close(free, start(input_ids=documents).logits, rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in start.modules())


@pytest.mark.parametrize("pool", [1, 9])
def test_a_pool_that_cannot_be_is_refused(start: Any, pool: int) -> None:
    with pytest.raises(Invalid, match="document pool"), document_pools(start, pool):
        pass


def test_two_experts_a_layer_carry_a_domain_only_where_documents_were_pooled(start: Any) -> None:
    documents = torch.cat([blocks(tiny_texts(domain, 2000, 120)) for domain in DOMAINS])
    costs = {}
    for pool in (8, 3):
        model = copy.deepcopy(start)
        losses = train_pooled(model, documents, pool=pool, steps=60)
        assert losses[-1] < losses[0] - 0.5
        found = [extract_domain(model, table(d, 5000), table(d, 6000), per_layer=2, accept_loss=True) for d in DOMAINS]
        costs[pool] = float(np.mean([extraction.cost for extraction in found]))
    assert costs[3] < 0.7 * costs[8], costs
    assert costs[3] < 0.03


def test_pools_are_drawn_and_the_balance_is_the_published_one(start: Any) -> None:
    """Each document's own number of experts; N·Σ f·P with f from the slots and P within the pools, written out."""
    documents = torch.cat([blocks(tiny_texts(domain, 3, 4))[:1] for domain in DOMAINS])
    router = start.model.layers[2].mlp.gate
    seen: list[torch.Tensor] = []
    handle = router.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    sizes = torch.randint(2, 7, (4,), generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), document_pools(start, 6, torch.Generator().manual_seed(9)) as terms:
        start(input_ids=documents, use_cache=False)
    handle.remove()
    assert len(set(sizes.tolist())) > 1, "all the same size: the test shows nothing"
    logits = (seen[0] @ router.weight.T).view(4, -1, 8)
    counts, chances = torch.zeros(8), torch.zeros(8)
    for document, size in enumerate(sizes.tolist()):
        pool = set(logits[document].softmax(-1).sum(0).topk(size).indices.tolist())
        for token in logits[document]:
            kept = torch.tensor([float(x) if e in pool else -torch.inf for e, x in enumerate(token)]).softmax(-1)
            chances += kept
            for expert in kept.topk(2).indices.tolist():
                counts[expert] += 1
    tokens = logits.shape[0] * logits.shape[1]
    want = 8 * float(((counts / (2 * tokens)) * (chances / tokens)).sum())
    assert float(terms[0]) == pytest.approx(want, rel=1e-4)
