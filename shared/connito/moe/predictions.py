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
# Texts that go through together.
BATCH = 8
_WORD = re.compile(r"\s*\S+")


Span = tuple[int, int]


def words_of(text: str, parts: Sequence[Span] | None = None) -> list[Span]:
    """Return the spans of characters of a text's words, without the first few, which nothing goes before; with `parts`, of the
    words that lie in one of these."""
    words = [match.span() for match in _WORD.finditer(text)][3:]
    return [w for w in words if parts is None or any(begin <= w[1] - 1 < end for begin, end in parts)]


def answers_of(text: str, pattern: str) -> list[Span]:
    """Return the spans of what the first group of a pattern matches in a text."""
    return [match.span(1) for match in re.finditer(pattern, text) if match[1].strip()]


def right(
    likeliest: Callable[[Sequence[list[int]]], list[list[int]]],
    tokenizer: Any,
    texts: Sequence[str],
    spans: Sequence[Sequence[Sequence[Span]]],
) -> list[list[list[bool]]]:
    """Return, text by text, which of its `spans`, in groups, are given exactly when all that goes before is. `likeliest`: the
    tokens behind each of some texts'."""
    encoded = [tokenizer(text, return_offsets_mapping=True, add_special_tokens=False) for text in texts]
    found = likeliest([each["input_ids"] for each in encoded])
    return [
        [[_exact(span, each["input_ids"], each["offset_mapping"], ids) for span in group] for group in groups]
        for each, ids, groups in zip(encoded, found, spans, strict=True)
    ]


class Likeliest:
    """The likeliest tokens behind those of texts, by a model that changes in the layer of `experts_name` and above only.

    Texts of one length or nearly go through together: what follows a text is not seen by it. Those that were asked about before
    go through these layers alone, where there was room to keep what enters them.
    """

    def __init__(self, model: Any, experts_name: str) -> None:
        self._model, self._name = model, experts_name
        self._begun: dict[tuple[tuple[int, ...], ...], PartialForward] = {}
        self._room = KEPT_BYTES

    def __call__(self, texts: Sequence[list[int]]) -> list[list[int]]:
        """Return the likeliest tokens by the model as it is now."""
        found: dict[int, list[int]] = {}
        order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        for start in range(0, len(order), BATCH):
            places = order[start : start + BATCH]
            rows = self._batch([texts[place] for place in places])
            found |= {place: row[: len(texts[place])] for place, row in zip(places, rows, strict=True)}
        return [found[place] for place in range(len(texts))]

    @torch.no_grad()
    def _batch(self, texts: list[list[int]]) -> list[list[int]]:
        key = tuple(map(tuple, texts))
        forward = self._begun.get(key)
        logits = self._begin(texts, key) if forward is None else forward.logits(self._name)
        found: list[list[int]] = logits.argmax(-1).tolist()
        return found

    def _begin(self, texts: list[list[int]], key: tuple[tuple[int, ...], ...]) -> torch.Tensor:
        length = max(map(len, texts))
        rows = [[*text, *[0] * (length - len(text))] for text in texts]
        forward = PartialForward(
            self._model, [self._name], torch.tensor(rows, device=next(self._model.parameters()).device)
        )
        logits = forward.begin()
        if not self._begun and not forward.check(self._name, logits):
            self._room = -1
        if forward.kept_bytes <= self._room:
            self._begun[key] = forward
            self._room -= forward.kept_bytes
        return logits


def _exact(span: Span, ids: list[int], offsets: list[Span], likeliest: list[int]) -> bool:
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < span[1] and end > span[0]]
    return bool(inside) and inside[0] > 0 and all(likeliest[i - 1] == ids[i] for i in inside)
