"""A tiny base whose experts work in groups: routing is restricted to a pool of experts per document while it learns.

In an ordinary MoE every token picks its experts for itself, so a domain is spread over nearly all of them and taking a subset
out costs much. Here (EMO, Bhagia et al. 2026) a document's tokens may only use the experts that its mean router
probability ranks first, as many as are drawn for it, so that subsets of every size work; a balance term over the whole
batch keeps all experts in use. Afterwards nothing is restricted; but what a domain needs lies together, and `connito
library extract` finds a subset that works.

Shapes: B documents, L tokens each, N experts, m experts in a document's pool, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.base.checkpoint import save_checkpoint
from connito.base.tiny import DOMAINS, blocks, pretrain, tiny_texts, tokenizer
from connito.base.upcycle import upcycle
from connito.errors import Invalid
from connito.runtime.progress import Progress, silent
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn

# Weight of the balance term beside the loss: enough to keep documents from crowding into one pool.
BALANCE = 0.05


def build_tiny_emo(
    out_dir: Path, seed: int = 0, *, pool: int = 3, dense_steps: int = 60, steps: int = 150, progress: Progress = silent
) -> Path:
    """Write the base to `out_dir` and return it. The same seed gives the same bytes on one kind of processor."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            dense = pretrain(seed, dense_steps, progress)
            texts = {domain: blocks(tiny_texts(domain, seed, 24))[:12] for domain in DOMAINS}
            held = blocks([text for domain in DOMAINS for text in tiny_texts(domain, seed + 1, 2)])
            model = upcycle(dense, texts, held, moe_layers=2, experts=8, top_k=2, seed=seed, progress=progress).model
            documents = torch.cat([blocks(tiny_texts(domain, seed + 2000, 160)) for domain in DOMAINS])
            train_pooled(model, documents, pool=pool, steps=steps, seed=seed, sampled=True, progress=progress)
    finally:
        torch.set_num_threads(threads)
    card = {"built_from": "tiny-emo", "seed": str(seed), "document_pool": str(pool)}
    return save_checkpoint(model, out_dir, tokenizer(), card)


def train_pooled(
    model: nn.Module,
    documents: torch.Tensor,
    *,
    pool: int,
    steps: int,
    seed: int = 0,
    batch: int = 8,
    learning_rate: float = 2e-3,
    sampled: bool = False,
    progress: Progress = silent,
) -> list[float]:
    """Train everything on `documents` (ids [n, L], one document each) under document pools; returns the losses.

    pool: most experts that a document may use, k ≤ pool ≤ N. sampled: each document's number is drawn evenly from k to
    `pool` at each step, as published; otherwise all have `pool`, and N restricts nothing. Raises `Invalid` for another
    number, and for a family whose router is not softmax over a linear layer. The model comes back frozen and in eval mode.
    """
    import torch

    model.requires_grad_(True)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with document_pools(model, pool, generator if sampled else None) as balance:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 10, (steps - step) / (0.5 * steps))
            rows = documents[torch.randint(len(documents), (batch,), generator=generator)]
            balance.clear()
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            optimiser.zero_grad()
            (loss + BALANCE * torch.stack(balance).mean()).backward()
            optimiser.step()
            losses.append(float(loss.detach()))
            progress(f"training in document pools, loss {losses[-1]:.2f}", (step + 1) / steps)
    model.requires_grad_(False)
    model.eval()
    return losses


@contextmanager
def document_pools(model: nn.Module, pool: int, draw: torch.Generator | None = None) -> Iterator[list[torch.Tensor]]:
    """Restrict each row of a batch, a document, to its `pool` best experts inside the block; with `draw` to as many as are
    drawn for it in each layer, k to `pool`.

    Yields a list that fills with one balance term per layer and forward pass: N·Σ_e f_e·P_e (Fedus et al. 2022, eq. 4) over
    the batch, with f_e the share of its slots that go to e and P_e its mean probability within the documents' pools.
    """
    import torch

    from connito.moe.layout import require_moe_layers

    layers = require_moe_layers(model)
    terms: list[torch.Tensor] = []
    lengths: list[int] = []
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    # How long a document is: routers see all tokens of a batch in a row.
    handles = [embeddings.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))]
    for layer in layers.values():
        if not layer.top_k <= pool <= layer.num_experts:
            raise Invalid(
                f"a document pool of {pool} cannot be: tokens use {layer.top_k} of {layer.num_experts} experts; choose a number "
                "from one to the other",
                reason=reasons_pb2.REASON_BAD_SPEC,
            )

        def hook(router: Any, args: tuple[Any, ...], output: Any, top_k: int = layer.top_k) -> Any:
            documents = args[0].numel() // args[0].shape[-1] // lengths[-1]
            sizes = torch.full((documents,), pool)
            if draw is not None:
                sizes = torch.randint(top_k, pool + 1, (documents,), generator=draw)
            logits, weights, ids, term = _pooled(router, args[0], lengths[-1], sizes, top_k)
            terms.append(term)
            return (logits, weights.to(output[1].dtype), ids, *output[3:])

        handles.append(layer.router.register_forward_hook(hook))
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def _pooled(
    router: Any, hidden: torch.Tensor, length: int, sizes: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (logits [B·L, N], weights and ids [B·L, k], balance term) when each document keeps to its `sizes` [B] best."""
    import torch

    logits = torch.nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight).float()
    total = logits.shape[-1]
    by_document = logits.softmax(dim=-1).view(-1, length, total).mean(dim=1)
    ranks = by_document.argsort(dim=-1, descending=True).argsort(dim=-1)
    allowed = (ranks < sizes.to(ranks.device)[:, None]).repeat_interleave(length, dim=0)
    logits = logits.masked_fill(~allowed, -torch.inf)
    scores = logits.softmax(dim=-1)
    weights, ids = scores.topk(top_k, dim=-1)
    used = torch.nn.functional.one_hot(ids, total).sum(dim=(0, 1)) / ids.numel()
    return logits, weights / weights.sum(dim=-1, keepdim=True), ids, total * (used * scores.mean(dim=0)).sum()
