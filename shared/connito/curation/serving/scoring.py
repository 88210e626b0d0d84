"""Log probabilities of a prompt's own tokens: `echo` with `logprobs`, as evaluation harnesses ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from connito.curation.serving.text import Writer

if TYPE_CHECKING:
    from connito.moe.head import Head


@dataclass
class Scores:
    """Of every token of `ids` but the first: its log probability after those before it, and the likeliest there with theirs."""

    ids: list[int]
    own: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)


def score(head: Head, ids: Sequence[int], count: int, *, ahead: bool, most: int) -> Scores:
    """Return the scores of ids [L] with the `count` likeliest in every place, and, `ahead`, of the likeliest next token;
    `most` tokens in one pass.
    """
    found, table, at = Scores(list(ids)), torch.tensor(ids, device=next(head.model.parameters()).device), 1
    for logits in head.logits(table, most):
        logprobs = logits.log_softmax(dim=-1)
        wanted = table[at : at + len(logits)]
        if len(wanted) < len(logits):  # What comes after the last one is not among them.
            wanted = torch.cat([wanted, logprobs[-1].argmax()[None]]) if ahead else wanted
            found.ids += wanted[len(logits) - 1 :].tolist()
        logprobs, at = logprobs[: len(wanted)], at + len(logits)
        found.own += logprobs.gather(1, wanted[:, None])[:, 0].tolist()
        best = logprobs.topk(min(count, logprobs.shape[-1]))
        found.likeliest += [
            list(zip(*row, strict=True)) for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return found


def document(tokenizer: Any, scores: Scores) -> tuple[str, dict[str, list[Any]]]:
    """Return the text, and its scores as the interface writes them: the first token has none, for nothing stands before it."""
    words: dict[int, str] = {}

    def word(token: int) -> str:
        if token not in words:
            words[token] = tokenizer.decode([token])
        return words[token]

    writer = Writer(tokenizer, ())
    pieces = [writer.add([token]) for token in scores.ids]
    return "".join(pieces) + writer.rest(), {
        "tokens": [word(token) for token in scores.ids],
        "token_logprobs": [None, *scores.own],
        # Where several tokens read the same, the likelier one is told: they come in that order, and the last one stays.
        "top_logprobs": [None, *({word(token): value for token, value in row[::-1]} for row in scores.likeliest)],
        "text_offset": list(accumulate(map(len, pieces[:-1]), initial=0)),
    }
