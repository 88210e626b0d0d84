from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from connito.moe import head
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_losses_and_gradients_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(head, "HEAD_VALUES", 3 * 50)  # three tokens at a time
    draw = torch.Generator().manual_seed(0)
    weight, offset = torch.randn(50, 8, generator=draw), torch.randn(50, generator=draw) if bias else None
    hidden = torch.randn(10, 8, generator=draw, requires_grad=True)
    targets, upstream = torch.randint(50, (10,), generator=draw), torch.randn(10, generator=draw)
    got: Any = head.ChunkedNLL.apply(hidden, weight, offset, targets)  # type: ignore[no-untyped-call]
    (gradient,) = torch.autograd.grad((got * upstream).sum(), hidden)
    wanted = functional.cross_entropy(functional.linear(hidden, weight, offset), targets, reduction="none")
    (expected,) = torch.autograd.grad((wanted * upstream).sum(), hidden)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradient, expected)


def capped(model: Any) -> Any:
    """Cap the logits softly, as some families do behind their output layer."""
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    model.forward = forward.__get__(model)
    return model


class Tables(TorchDispatchMode):
    """The most tokens for which logits are made at once inside the block."""

    def __init__(self, layer: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.own, self.vocabulary, self.tokens = layer.untyped_storage().data_ptr(), len(layer), 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else [out]:
            # A transposed view of the output layer's matrix is no new tensor.
            table = isinstance(made, torch.Tensor) and made.shape[-1:] == (self.vocabulary,)
            if table and made.untyped_storage().data_ptr() != self.own:
                self.tokens = max(self.tokens, made.numel() // self.vocabulary)
        return out


@pytest.mark.parametrize("behind", [lambda model: model, capped])
def test_losses_and_gradients_are_the_familys_and_no_table_of_logits_is_made(
    full: Any, monkeypatch: pytest.MonkeyPatch, behind: Any
) -> None:
    model = behind(full)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(head, "HEAD_VALUES", 5 * vocabulary)
    made = head.Head(model)
    assert (made.output is None) == (behind is capped)
    ids = torch.arange(2 * 21).view(2, 21) % vocabulary
    embedded = torch.randn(2, 20, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    embedded.requires_grad_(True)
    hooked = model.get_input_embeddings().register_forward_hook(lambda _m, _a, _o: embedded)
    wanted = functional.cross_entropy(
        model(input_ids=ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    (expected,) = torch.autograd.grad(wanted.sum(), embedded)
    with Tables(model.lm_head.weight) as tables:
        got = made.nll(ids[:, :-1], ids[:, 1:])
        (gradient,) = torch.autograd.grad(got.sum(), embedded)
    hooked.remove()
    torch.testing.assert_close(got.flatten(), wanted)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert 0 < tables.tokens <= 5


@pytest.mark.parametrize("bias", [False, True])
def test_losses_by_blocks_of_words_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(head, "TILE_TOKENS", 4)
    monkeypatch.setattr(head, "BLOCK_WORDS", 7)
    draw = torch.Generator().manual_seed(1)
    weight, offset = torch.randn(50, 8, generator=draw), torch.randn(50, generator=draw) if bias else None
    hidden, targets = 5 * torch.randn(10, 8, generator=draw), torch.arange(10) * 5
    got: Any = head.ChunkedNLL.apply(hidden, weight, offset, targets)  # type: ignore[no-untyped-call]
    wanted = functional.cross_entropy(functional.linear(hidden, weight, offset), targets, reduction="none")
    torch.testing.assert_close(got, wanted)
    hidden[3] = torch.nan
    broken: Any = head.ChunkedNLL.apply(hidden, weight, offset, targets)  # type: ignore[no-untyped-call]
    assert broken.isnan().nonzero().flatten().tolist() == [3]


def test_a_model_is_measured_once(full: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cycle's training makes several heads of one model; a forward through all of it for each is what a step costs."""
    measure, measured = head._measured, list[Any]()

    def counted(model: Any, body: Any, output: Any) -> Any:
        measured.append(model)
        return measure(model, body, output)

    monkeypatch.setattr(head, "_measured", counted)
    other = copy.deepcopy(full)
    first, again = head.Head(full), head.Head(full)
    assert (again.body, again.output) == (first.body, first.output) == (full.model, full.lm_head)
    assert head.Head(other).body is other.model
    assert measured == [full, other]
    other.lm_head.weight.requires_grad_()
    assert head.Head(other).body is None, "a layer that learns is not left out of a gradient"
