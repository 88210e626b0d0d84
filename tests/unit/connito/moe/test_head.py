from __future__ import annotations

from typing import Any

import pytest
import torch
from connito.moe import head
from torch.nn import functional


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_losses_and_gradients_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(head, "CHUNK_VALUES", 3 * 50)  # three tokens at a time
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


def test_the_bare_output_layer_is_used_only_where_it_is_the_whole_head(full: Any) -> None:
    assert head.Head(full).output is not None
    scaled: Any = full
    original = type(scaled).forward

    def capped(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = 5 * torch.tanh(out.logits / 5)
        return out

    scaled.forward = capped.__get__(scaled)
    assert head.Head(scaled).output is None
    ids = torch.arange(10)[None]
    got = head.Head(scaled).nll(ids[:, :-1], ids[:, 1:])
    wanted = functional.cross_entropy(scaled(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="none")
    torch.testing.assert_close(got[0], wanted)


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
