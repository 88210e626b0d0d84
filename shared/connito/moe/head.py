"""The end of a causal language model: hidden states to losses, without the whole table of logits.

With a vocabulary of 49 k words the logits of one batch are the largest tensor of a training step, and the head is
frozen: its loss and the gradient of its input are computed chunk by chunk, and no logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from connito.moe.batches import placed
from connito.moe.engine import HEAD_VALUES

if TYPE_CHECKING:
    from torch import nn

# Without gradients a tile of so many tokens meets the output layer block by block. A block of weights is then prepared for
# multiplication once for all of them; with few tokens and all words at a time that preparation takes as long as the product.
TILE_TOKENS, BLOCK_WORDS = 1024, 4096


# What was measured of each model that is still there: a cycle's training makes several heads of one.
_SPLIT: WeakKeyDictionary[Any, tuple[Any, Any]] = WeakKeyDictionary()


class Head:
    """Negative log-likelihoods of a model's next tokens.

    Where the family has nothing but a linear layer between its last hidden state and its logits, its loss and gradient are
    computed here. Where it caps or scales them, its own forward makes the logits of a few tokens at a time, given their
    hidden states. Either is measured once on four tokens; a family that is neither makes all logits at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.body, self.output = _split(model)

    @property
    def is_plain(self) -> bool:
        """Return whether the end is nothing but a linear layer: it leaves the model as it is, for other threads too."""
        return self.body is not None and isinstance(self.output, torch.nn.Linear)

    def nll(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss per token, float32 [B, L], for `ids` and next tokens `targets` [B, L]. Differentiable in the body's
        input.

        positions: [B, L], from 0 in every document of a row. counts: bool [B, L]; the other tokens' losses are 0, and the
        output layer does not see them. A `Batch` is these four.
        """
        options = placed(positions)
        if self.body is None:
            outputs = self.model(input_ids=ids, use_cache=False, **options).logits
            of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _full_nll
        else:
            outputs = self.body(input_ids=ids, use_cache=False, **options).last_hidden_state
            of = self.nll_of_hidden
        if counts is None:
            return of(outputs, targets)
        losses = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
        if counts.any():
            losses[counts] = of(outputs[counts], targets[counts])
        return losses

    def nll_of_hidden(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss per token from last hidden states [..., H] (after the final norm) and targets [...]."""
        flat, wanted = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if isinstance(self.output, torch.nn.Linear):
            losses: torch.Tensor = ChunkedNLL.apply(  # type: ignore[no-untyped-call]
                flat, self.output.weight, self.output.bias, wanted
            )
            return losses.view(targets.shape)
        step = max(1, HEAD_VALUES // self.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
        parts = [
            checkpoint(
                self._part, flat[i : i + step], wanted[i : i + step], use_reentrant=False, preserve_rng_state=False
            )
            for i in range(0, len(flat), step)
        ]
        return torch.cat(parts).view(targets.shape)

    def logits(self, ids: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
        """Yield the logits of one sequence's ids [L] in their order, float32 [n, V], a few tokens at a time. No gradients.

        The body computes `most` tokens in one pass, over what it keeps of those before.
        """
        with torch.no_grad():
            if self.body is None:
                yield self.model(input_ids=ids[None], use_cache=False).logits[0].float()
                return
            step = max(1, HEAD_VALUES // self.model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
            kept = {"past_key_values": DynamicCache(config=self.model.config)} if len(ids) > most else {}
            for some in torch.split(ids, most):
                hidden = self.body(input_ids=some[None], use_cache=bool(kept), **kept).last_hidden_state
                for part in hidden[0].split(step):
                    made = (
                        _logits_of(self.model, self.body, part[None])[0] if self.output is None else self.output(part)
                    )
                    yield made.float()

    def _part(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return _full_nll(_logits_of(self.model, self.body, hidden[None]), targets[None])[0]


class ChunkedNLL(torch.autograd.Function):
    """−log softmax(h Wᵀ + b)[target] per token, for a frozen output layer.

    h [T, H], W [V, H], targets [T] -> float32 [T]. The backward pass assumes one upstream gradient per token: the input's
    gradient (softmax − onehot)·W is made in the forward pass, while the chunk's logits are still there.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
    ) -> torch.Tensor:
        wanted = hidden.requires_grad
        if not wanted:
            return torch.cat(
                [
                    _tile(hidden[i : i + TILE_TOKENS], weight, bias, targets[i : i + TILE_TOKENS])
                    for i in range(0, len(hidden), TILE_TOKENS)
                ]
            )
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        step = max(1, HEAD_VALUES // weight.shape[0])
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            logits = F.linear(hidden[part], weight, bias).float()
            target = targets[part, None]
            logits -= logits.amax(dim=1, keepdim=True)
            shifted = logits.gather(1, target)
            total = logits.exp_().sum(dim=1, keepdim=True)
            losses[part] = (total.log() - shifted).squeeze(1)
            logits /= total
            logits.scatter_add_(1, target, torch.full_like(shifted, -1.0))
            gradient[part] = logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


def _tile(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor) -> torch.Tensor:
    """Return the losses of some tokens, float32, with a running maximum and sum over blocks of words (Milakov &
    Gimelshein 2018).
    """
    wanted = targets[:, None]
    maximum = torch.full((len(hidden), 1), -torch.inf, device=hidden.device)
    total, own = torch.zeros_like(maximum), torch.zeros_like(maximum)
    for start in range(0, weight.shape[0], BLOCK_WORDS):
        words = slice(start, start + BLOCK_WORDS)
        logits = F.linear(hidden, weight[words], None if bias is None else bias[words]).float()
        place = wanted - start
        inside = (place >= 0) & (place < logits.shape[1])
        own = torch.where(inside, logits.gather(1, place.clamp(0, logits.shape[1] - 1)), own)
        larger = torch.maximum(maximum, logits.amax(dim=1, keepdim=True))
        logits -= larger
        total = total * (maximum - larger).exp_() + logits.exp_().sum(dim=1, keepdim=True)
        maximum = larger
    return (total.log() + (maximum - own)).squeeze(1)


def _full_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    flat = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1), reduction="none")
    return flat.view(targets.shape)


def _logits_of(model: Any, body: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits that the model's own forward makes of last hidden states [1, n, H]."""
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    body.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=hidden)
    try:
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    finally:
        del body.forward
    return logits


def _split(model: Any) -> tuple[Any, Any]:
    """Return (body, output layer) where a plain linear layer makes the model's logits of the body's last hidden state, (body,
    None) where the rest of its forward does, and (None, None) otherwise.
    """
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    body = getattr(model, getattr(model, "base_model_prefix", "") or "model", None)
    if output is None or body is None or body is model or output.weight.requires_grad:
        return None, None
    if model not in _SPLIT:
        _SPLIT[model] = _measured(model, body, output)
    return _SPLIT[model]


def _measured(model: Any, body: Any, output: Any) -> tuple[Any, Any]:
    """Return what `_split` does, by a few tokens that go through all of the model."""
    ids = torch.arange(4, device=output.weight.device)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            return None, None
        if isinstance(output, torch.nn.Linear) and not getattr(model.config, "final_logit_softcapping", None):
            plain = output(hidden.to(output.weight.dtype)).float()
            if plain.shape == logits.shape and torch.allclose(plain, logits, rtol=1e-4, atol=1e-5):
                return body, output
        try:
            own = _logits_of(model, body, hidden).float()
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            return None, None
    return (body if own.shape == logits.shape and torch.allclose(own, logits, rtol=1e-4, atol=1e-5) else None), None
