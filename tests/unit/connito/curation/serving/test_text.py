"""An answer's tokens as text."""

from __future__ import annotations

from collections.abc import Sequence

from connito.curation.serving.text import OF_A_CHARACTER, Writer


class Bytes:
    """A tokenizer of bytes; 256 is a token that reads as nothing. Counts what it decodes."""

    def __init__(self) -> None:
        self.decoded = 0

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        self.decoded += len(ids)
        return bytes(one for one in ids if one < 256).decode(errors="replace")


def written(ids: Sequence[int]) -> tuple[str, int]:
    tokenizer = Bytes()
    writer = Writer(tokenizer, ())
    return "".join(writer.add([one]) for one in ids) + writer.rest(), tokenizer.decoded


def test_characters_come_whole() -> None:
    tokenizer = Bytes()
    writer = Writer(tokenizer, ())
    assert [writer.add([byte]) for byte in "aὦ".encode()] == ["a", "", "", "ὦ"]


def test_tokens_that_make_no_character_cost_no_more_than_others() -> None:
    """Each looked at all before it: a context of them was hours of work."""
    for token in (0xBF, 0xE1, 256):
        text, decoded = written([token] * 3000 + list("ὦ!".encode()))
        assert text.endswith("!")
        assert decoded < 3000 * 6 * OF_A_CHARACTER
