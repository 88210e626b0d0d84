"""Next words that a model gets right, as a person would count them. Needs torch.

A word, or the answer to a task, is right when greedy decoding gives exactly it. Given what goes before, that is so if and only if
each of its tokens is the likeliest one, so one forward pass tells it for every word of a text, without decoding anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from connito.moe.evaluate import PartialForward

# Hidden states that are kept between two askings.
KEPT_BYTES = 1 << 30
_WORD = re.compile(r"\s*\S+")


Span = tuple[int, int]


def words_of(text: str) -> list[Span]:
    """Return the spans of characters of a text's words, without the first few, which nothing goes before."""
    return [match.span() for match in _WORD.finditer(text)][3:]


def answers_of(text: str, pattern: str) -> list[Span]:
    """Return the spans of what the first group of a pattern matches in a text."""
    return [match.span(1) for match in re.finditer(pattern, text) if match[1].strip()]


def right(
    likeliest: Callable[[list[int]], list[int]], tokenizer: Any, text: str, spans: Sequence[Sequence[Span]]
) -> list[list[bool]]:
    """Return which spans of a text, in groups, are given exactly when all that goes before is. `likeliest` token behind each."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    found = likeliest(ids)
    return [[_exact(span, ids, offsets, found) for span in group] for group in spans]


class Likeliest:
    """The likeliest token behind each of a text, by a model that changes in the layer of `experts_name` and above only.

    A text that was asked about before goes through these layers alone, where there was room to keep what enters them.
    """

    def __init__(self, model: Any, experts_name: str) -> None:
        self._model, self._name = model, experts_name
        self._begun: dict[tuple[int, ...], PartialForward] = {}
        self._room = KEPT_BYTES

    @torch.no_grad()
    def __call__(self, ids: list[int]) -> list[int]:
        """Return the likeliest tokens by the model as it is now."""
        forward = self._begun.get(tuple(ids))
        logits = self._begin(ids) if forward is None else forward.logits(self._name)
        found: list[int] = logits[0].argmax(-1).tolist()
        return found

    def _begin(self, ids: list[int]) -> torch.Tensor:
        row = torch.tensor([ids], device=next(self._model.parameters()).device)
        forward = PartialForward(self._model, [self._name], row)
        logits = forward.begin()
        if not self._begun and not forward.check(self._name, logits):
            self._room = -1
        if forward.kept_bytes <= self._room:
            self._begun[tuple(ids)] = forward
            self._room -= forward.kept_bytes
        return logits


def _exact(span: Span, ids: list[int], offsets: list[Span], likeliest: list[int]) -> bool:
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < span[1] and end > span[0]]
    return bool(inside) and inside[0] > 0 and all(likeliest[i - 1] == ids[i] for i in inside)
