"""Text as token ids: the one place where text meets a tokenizer.

Text is text: where it spells a special token (`<|endoftext|>`), it becomes the characters of that spelling. Only a chat
template, never what people wrote, puts special tokens into a document.

A tokenizer looks for its special tokens everywhere in what it is given. So texts that spell one go through a twin of it, in
which special tokens are spelled in private characters, under their own ids; all the rest is the same.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

# Tokens of turns that some publishers do not mark as special.
_CONTROL = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
# Characters of the private plane 15, by which nothing is written: a token's number in the twin, and in a text.
_TOKEN, _LITERAL, _DIGITS = "\U000f0000", "\U000f0001", "\U000f0010"
# Those characters, and halves of characters, which no tokenizer takes.
_PRIVATE = re.compile("[\U000f0000-\U000f001f\ud800-\udfff]")
_KNOWN = "connito_encoder"


class Encoder:
    """A tokenizer that takes text as text. Use `encoder_of`, which makes one for each tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        special = {str(token) for token in tokenizer.all_special_tokens}
        self.reserved: dict[str, int] = {
            str(token.content): int(number)
            for number, token in sorted(added.items())
            if token.content and (token.special or token.content in special or _CONTROL.fullmatch(token.content))
        }
        # Longer spellings first: one may begin like another.
        spellings = sorted(self.reserved, key=lambda spelling: (-len(spelling), spelling))
        self._reserved = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, all of it characters, without anything around it."""
        texts = [_PRIVATE.sub("\N{REPLACEMENT CHARACTER}", text) for text in texts]
        spelling = [bool(self._reserved.search(text)) for text in texts]
        ids = iter(self._ordinary([text for text, spells in zip(texts, spelling, strict=True) if not spells]))
        return [
            self._as_characters(text) if spells else next(ids) for text, spells in zip(texts, spelling, strict=True)
        ]

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """Return what the tokenizer itself puts before and behind a text; the end of text is always behind it.

        Raises `Invalid` for a tokenizer without one.
        """
        if self.tokenizer.eos_token_id is None:
            raise Invalid(
                "the base's tokenizer names no token for the end of a text; name it as eos_token in its tokenizer_config.json",
                reason=reasons.REASON_BAD_SPEC,
            )
        bare, whole = self._ordinary(["a"])[0], list(self.tokenizer("a", verbose=False).input_ids)
        place = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        front, behind = whole[:place], whole[place + len(bare) :]
        end = int(self.tokenizer.eos_token_id)
        return front, behind if end in behind else [*behind, end]

    def documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text as a whole document: with what the tokenizer puts before one, and its end."""
        front, behind = self.around
        return [[*front, *ids, *behind] for ids in self.encode(texts)]

    def protected(self, text: str) -> str:
        """Return a text for a template, in which what spells a special token cannot be taken for one."""
        text = _PRIVATE.sub("\N{REPLACEMENT CHARACTER}", text)
        return self._reserved.sub(lambda match: _numbered(_LITERAL, self.reserved[match[0]]), text)

    def marked(self, text: str, spans: Iterable[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Return the token ids of a rendered template, and which of them lie in `spans`, [start, end) in characters.

        `text` was made of `protected` texts: what is spelled in it is the template's own.
        """
        if _LITERAL in text:
            text, spans = self._respelled(text, list(spans))
            return self._located(self._twin_offsets(text), text, spans)
        if self.tokenizer.is_fast:
            out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return self._located((list(out["input_ids"]), list(out["offset_mapping"])), text, spans)
        return self._in_pieces(text, list(spans))

    def _ordinary(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [list(part) for part in ids]

    def _as_characters(self, text: str) -> list[int]:
        if self.tokenizer.is_fast:
            return list(self._twin.encode(text, add_special_tokens=False).ids)
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        """Return text through a tokenizer without a twin: control tokens that are not special are broken up."""
        ids: list[int] = []
        for piece in re.split(f"({_CONTROL.pattern})", text, flags=re.DOTALL):
            parts = [piece[:1], piece[1:]] if piece in self.reserved else [piece]
            for part in filter(None, parts):
                out = self.tokenizer(part, add_special_tokens=False, split_special_tokens=True, verbose=False)
                ids += out["input_ids"]
        return ids

    @cached_property
    def _twin(self) -> Any:
        """Return the twin of a tokenizer of the library tokenizers."""
        from tokenizers import Tokenizer

        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        names = {spelling: _numbered(_TOKEN, number) for spelling, number in self.reserved.items()}
        for token in described["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = described["model"]
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
        elif isinstance(vocabulary, list):
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        if model.get("merges"):
            model["merges"] = [pair for pair in model["merges"] if not _makes(pair, names)]
        twin = Tokenizer.from_str(json.dumps(described))
        twin.no_truncation()
        twin.no_padding()
        return twin

    def _twin_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self.tokenizer.is_fast:
            out = self._twin.encode(text, add_special_tokens=False)
            return list(out.ids), list(out.offsets)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        by_name = {_numbered(_TOKEN, number): number for number in self.reserved.values()}
        for piece in re.split(f"({_TOKEN}[{_DIGITS}-\U000f001f]+)", text):
            found = [by_name[piece]] if piece in by_name else self._plain(piece)
            ids += found
            offsets += [(place, place + len(piece))] * len(found)
            place += len(piece)
        return ids, offsets

    def _respelled(self, text: str, spans: list[tuple[int, int]]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text for the twin, and the spans in it: the template's tokens in private, people's in plain spelling."""
        spelling_of = {_numbered(_LITERAL, number): spelling for spelling, number in self.reserved.items()}
        pattern = re.compile("|".join(map(re.escape, spelling_of)) + "|" + self._reserved.pattern)
        parts: list[str] = []
        shifts: list[tuple[int, int]] = [(0, 0)]
        place = length = 0
        for match in pattern.finditer(text):
            new = spelling_of.get(match[0]) or _numbered(_TOKEN, self.reserved[match[0]])
            parts += [text[place : match.start()], new]
            length += match.start() - place + len(new)
            place = match.end()
            shifts.append((place, length - place))
        parts.append(text[place:])
        starts = [start for start, _ in shifts]

        def moved(at: int) -> int:
            return at + shifts[bisect_right(starts, at) - 1][1]

        return "".join(parts), [(moved(start), moved(end)) for start, end in spans]

    @staticmethod
    def _located(
        encoded: tuple[list[int], list[tuple[int, int]]], text: str, spans: Iterable[tuple[int, int]]
    ) -> tuple[list[int], list[bool]]:
        ids, offsets = encoded
        inside = bytearray(len(text) + 1)
        for start, end in spans:
            inside[start:end] = b"\1" * (end - start)
        return ids, [any(inside[start:end]) for start, end in offsets]

    def _in_pieces(self, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Return the same of a tokenizer that does not say where its tokens lie: how many are before each border says it."""
        (ids,) = self._ordinary([text])
        borders = [border for span in spans for border in span]
        places = [min(len(part), len(ids)) for part in self._ordinary([text[:border] for border in borders])]
        marks = [False] * len(ids)
        for start, end in zip(places[::2], places[1::2], strict=True):
            marks[start:end] = [True] * (end - start)
        return ids, marks


def encoder_of(tokenizer: Any) -> Encoder:
    """Return the encoder of a tokenizer, made once."""
    known = getattr(tokenizer, _KNOWN, None)
    if known is None:
        known = Encoder(tokenizer)
        setattr(tokenizer, _KNOWN, known)
    assert isinstance(known, Encoder)
    return known


def _numbered(mark: str, number: int) -> str:
    return mark + "".join(chr(ord(_DIGITS) + int(digit)) for digit in str(number)) + chr(ord(_DIGITS) + 10)


def _makes(pair: Any, names: Iterable[str]) -> bool:
    """Return whether a merge of a byte-pair model takes or makes one of `names`."""
    one, other = pair.split(" ", 1) if isinstance(pair, str) else pair
    return one in names or other in names or one + other in names
