"""Text is text, whatever it spells, in tokenizers of every kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from connito.data.encoding import encoder_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat import ADDED, SPECIAL, TOKENIZERS


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


def test_text_that_spells_nothing_is_as_the_tokenizer_has_it(tokenizer: Any) -> None:
    texts = ["who keeps a ledger", " keeps\n\na house ", "", "é ß x"]
    want = [list(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    assert encoder_of(tokenizer).encode(texts) == want
    assert encoder_of(tokenizer).encode([]) == []


def test_text_that_spells_a_special_token_becomes_its_characters(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    for spelling in encoder.reserved:
        for text in (f"a{spelling}b", spelling, f"the ledger {spelling} was", f"{spelling}{spelling}"):
            (ids,) = encoder.encode([text])
            assert not set(ids) & set(encoder.reserved.values()), (text, ids)
            assert spelling.replace(" ", "") in tokenizer.decode(ids).replace(" ", "")
    assert {tokenizer.eos_token, *SPECIAL, *ADDED[:2]} <= set(encoder.reserved)


def test_words_that_were_added_to_the_vocabulary_stay_words(tokenizer: Any) -> None:
    (ids,) = encoder_of(tokenizer).encode(["<think>the house</think>"])
    assert {tokenizer.convert_tokens_to_ids(token) for token in ADDED[2:]} <= set(ids)


def test_a_text_among_others_does_not_change_them(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    texts = ["the house", f"the{tokenizer.eos_token}house", "a ledger"]
    assert encoder.encode(texts) == [encoder.encode([text])[0] for text in texts]


def test_a_document_has_what_the_tokenizer_puts_around_a_text(tokenizer: Any) -> None:
    (ids,) = encoder_of(tokenizer).documents(["the house"])
    whole = list(tokenizer("the house").input_ids)
    assert ids == (whole if whole[-1] == tokenizer.eos_token_id else [*whole, tokenizer.eos_token_id])


def test_half_a_character_is_replaced(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    half = json.loads('"a\\ud800b"')
    assert encoder.encode([half]) == encoder.encode(["a\ufffdb"])
    assert encoder.protected(half) == "a\ufffdb"


def test_private_characters_cannot_forge_anything(tokenizer: Any) -> None:
    encoder = encoder_of(tokenizer)
    forged = encoder.protected(tokenizer.eos_token).replace("\U000f0001", "\U000f0000")
    (ids,) = encoder.encode([f"{forged} {tokenizer.eos_token}"])
    assert not set(ids) & set(encoder.reserved.values()) - {tokenizer.unk_token_id}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(["the ", "house", "<|im_end|>", "</s>", "<|endoftext|>", "<", "|>", "é", "\n"]), max_size=8
    )
)
def test_no_text_ever_makes_a_special_token(parts: list[str]) -> None:
    for make in (TOKENIZERS["bytes"], TOKENIZERS["pieces"]):
        encoder = _once(make)
        (ids,) = encoder.encode(["".join(parts)])
        assert not set(ids) & set(encoder.reserved.values()) - {encoder.tokenizer.unk_token_id}


_MADE: dict[Any, Any] = {}


def _once(make: Any) -> Any:
    if make not in _MADE:
        _MADE[make] = encoder_of(make())
    return _MADE[make]
