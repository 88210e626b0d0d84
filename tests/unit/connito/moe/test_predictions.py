"""Next words and answers that a model gets right are those that greedy decoding gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from connito.moe.predictions import answers_of, right, words_of


class Parrot(torch.nn.Module):
    """Knows one text by heart: after each token of it, the next one; elsewhere token 0."""

    def __init__(self, known: list[int]) -> None:
        super().__init__()
        self.known, self.scale = known, torch.nn.Parameter(torch.ones(1))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        ids = input_ids[0].tolist()
        logits = torch.zeros(1, len(ids), 256)
        for place in range(len(ids)):
            heart = ids[: place + 1] == self.known[: place + 1] and place + 1 < len(self.known)
            logits[0, place, self.known[place + 1] if heart else 0] = 1
        return SimpleNamespace(logits=logits)


def spell(text: str, **_: bool) -> dict[str, Any]:
    return {"input_ids": list(text.encode()), "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def test_a_word_is_right_when_every_token_of_it_is() -> None:
    text = "one two six ten now"
    assert [text[slice(*span)] for span in words_of(text)] == [" ten", " now"]
    known = list(b"one two six ten nXw")
    assert right(Parrot(known), spell, text, [words_of(text)]) == [[True, False]]


def test_an_answer_is_what_the_pattern_asks_for() -> None:
    text = "Question: 1 + 1\nAnswer: 2\n\nQuestion: 2 + 2\nAnswer: 4\n"
    spans = answers_of(text, r"\nAnswer: ([^\n]+)")
    assert [text[slice(*span)] for span in spans] == ["2", "4"]
    wrong = list(text.replace("Answer: 4", "Answer: 5").encode())
    assert right(Parrot(list(text.encode())), spell, text, [spans, []]) == [[True, True], []]
    assert right(Parrot(wrong), spell, text, [spans]) == [[True, False]]
    assert answers_of("Answer: 2", r"\nAnswer: ([^\n]+)") == []
