"""Next words and answers that a model gets right are those that greedy decoding gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from connito.moe.layout import require_moe_layers
from connito.moe.predictions import Likeliest, answers_of, right, words_of


class Parrot:
    """Knows one text by heart: after each token of it, the next one; elsewhere token 0."""

    def __init__(self, known: list[int]) -> None:
        self.known = known

    def __call__(self, texts: Sequence[list[int]]) -> list[list[int]]:
        return [self.next_of(ids) for ids in texts]

    def next_of(self, ids: list[int]) -> list[int]:
        known = [self.known[: place + 1] == ids[: place + 1] for place in range(len(ids))]
        return [
            self.known[place + 1] if heart and place + 1 < len(self.known) else 0 for place, heart in enumerate(known)
        ]


def spell(text: str, **_: bool) -> dict[str, Any]:
    return {"input_ids": list(text.encode()), "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def test_a_word_is_right_when_every_token_of_it_is() -> None:
    text = "one two six ten now"
    assert [text[slice(*span)] for span in words_of(text)] == [" ten", " now"]
    known = list(b"one two six ten nXw")
    assert right(Parrot(known), spell, [text], [[words_of(text)]]) == [[[True, False]]]


def test_an_answer_is_what_the_pattern_asks_for() -> None:
    text = "Question: 1 + 1\nAnswer: 2\n\nQuestion: 2 + 2\nAnswer: 4\n"
    spans = answers_of(text, r"\nAnswer: ([^\n]+)")
    assert [text[slice(*span)] for span in spans] == ["2", "4"]
    wrong = list(text.replace("Answer: 4", "Answer: 5").encode())
    assert right(Parrot(list(text.encode())), spell, [text], [[spans, []]]) == [[[True, True], []]]
    assert right(Parrot(wrong), spell, [text], [[spans]]) == [[[True, False]]]
    assert answers_of("Answer: 2", r"\nAnswer: ([^\n]+)") == []
    part = answers_of("a b c. d e f\ng h", r"\A[^.]+\. ([^\n]+)")
    assert [("a b c. d e f\ng h")[slice(*span)] for span in words_of("a b c. d e f\ng h", part)] == [" d", " e", " f"]


def test_texts_that_go_through_together_do_not_see_each_other(full: Any) -> None:
    layers = require_moe_layers(full)
    likeliest = Likeliest(full, layers[min(layers)].experts_name)
    texts = [[3, 1, 4, 1, 5, 9, 2, 6][: 2 + place % 7] for place in range(11)]
    with torch.no_grad():
        alone = [full(input_ids=torch.tensor([text])).logits[0].argmax(-1).tolist() for text in texts]
    assert likeliest(texts) == likeliest(texts) == alone


def test_texts_asked_about_again_go_through_the_changed_layers_alone(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, ids = require_moe_layers(full), [3, 1, 4, 1, 5, 9, 2, 6]
    first = layers[min(layers)]
    likeliest, below = Likeliest(full, first.experts_name), full.get_submodule(f"model.layers.{min(layers) - 1}")
    runs: list[int] = []
    handle = below.self_attn.register_forward_hook(lambda *_: runs.append(1))

    def plain() -> list[int]:
        with torch.no_grad():
            found: list[int] = full(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        return found

    try:
        before = likeliest([ids])[0]
        assert len(runs) == 1
        with torch.no_grad():
            for name in first.parameters:
                getattr(first.experts, name).mul_(-3)
        after = likeliest([ids])[0]
        assert len(runs) == 1, "the layers below did not run again"
        assert after == plain()
        assert before != after
        # Without room, and where the shortcut does not give what the model does, all layers run.
        monkeypatch.setattr("connito.moe.predictions.KEPT_BYTES", 0)
        careful = Likeliest(full, first.experts_name)
        assert careful([ids]) == careful([ids]) == [plain()]
        monkeypatch.undo()
        monkeypatch.setattr("connito.moe.evaluate.PartialForward.check", lambda *_: False)
        careful = Likeliest(full, first.experts_name)
        careful([ids])
        runs.clear()
        assert careful([ids]) == [plain()]
        assert len(runs) == 2
    finally:
        handle.remove()
