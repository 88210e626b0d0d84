"""Next words that a model gets right, as a person would count them. Needs torch.

A word, or the answer to a task, is right when greedy decoding gives exactly it. Given what goes before, that is so if and only if
each of its tokens is the likeliest one, so one forward pass tells it for every word of a text, without decoding anything.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch

_WORD = re.compile(r"\s*\S+")


Span = tuple[int, int]


def words_of(text: str) -> list[Span]:
    """Return the spans of characters of a text's words, without the first few, which nothing goes before."""
    return [match.span() for match in _WORD.finditer(text)][3:]


def answers_of(text: str, pattern: str) -> list[Span]:
    """Return the spans of what the first group of a pattern matches in a text."""
    return [match.span(1) for match in re.finditer(pattern, text) if match[1].strip()]


@torch.no_grad()
def right(model: Any, tokenizer: Any, text: str, spans: Sequence[Sequence[Span]]) -> list[list[bool]]:
    """Return which spans of a text, in groups, a model gives exactly when it is given all that goes before."""
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    likeliest = _likeliest(model, ids)
    return [[_exact(span, ids, offsets, likeliest) for span in group] for group in spans]


def _likeliest(model: Any, ids: list[int]) -> list[int]:
    """Return the likeliest token behind each."""
    row = torch.tensor([ids], device=next(model.parameters()).device)
    found: list[int] = model(input_ids=row, use_cache=False).logits[0].argmax(-1).tolist()
    return found


def _exact(span: Span, ids: list[int], offsets: list[Span], likeliest: list[int]) -> bool:
    inside = [i for i, (begin, end) in enumerate(offsets) if begin < span[1] and end > span[0]]
    return bool(inside) and inside[0] > 0 and all(likeliest[i - 1] == ids[i] for i in inside)
