"""Texts as blocks of token ids, a piece at a time: memory does not depend on how long the text is."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from connito.data.encoding import encoder_of
from connito.data.reading.reader import Reading
from connito.data.reading.rows import Account
from connito.data.reading.texts import documents_of
from connito.data.templates import Templates
from connito.errors import Invalid, NotFound
from connito.v1 import reasons_pb2

Ids = npt.NDArray[np.int32]
# Blocks that are tokenised before they are handed on together.
_BATCH = 64


def blocks(
    tokenizer: Any,
    paths: Sequence[Path],
    length: int = 512,
    progress: Callable[[float], None] | None = None,
    accounts: dict[str, Account] | None = None,
) -> Iterator[Ids]:
    """Yield arrays int32 [n, length] of the texts in a row, each with its end, and what is left as [1, rest].

    Texts are read as jobs read them. `progress` gets the share of bytes read, as far as it is known;
    `accounts` what was read of each path, and what was not.
    """
    total, done = max(1, sum(map(_size, paths))), 0
    ids = array("i")
    for path in paths:
        reading, found = Reading(path), 0
        for document in _documents(tokenizer, reading):
            ids.extend(document)
            found += 1
            if len(ids) >= _BATCH * length:
                count = len(ids) // length * length
                yield np.asarray(ids[:count], dtype=np.int32).reshape(-1, length)
                ids = ids[count:]
                if progress is not None:
                    progress(min(1.0, (done + reading.account.bytes) / total))
        if not found:
            raise Invalid(f"{path} holds no text ({reading.account})", reason=reasons_pb2.REASON_SELECTION_FAILED)
        if accounts is not None:
            accounts[str(path)] = reading.account
        done += _size(path)
    if progress is not None:
        progress(1.0)
    if count := len(ids) // length * length:
        yield np.asarray(ids[:count], dtype=np.int32).reshape(-1, length)
    if len(ids) > count + 1:
        yield np.asarray(ids[count:], dtype=np.int32).reshape(1, -1)


def _documents(tokenizer: Any, reading: Reading) -> Iterator[list[int]]:
    """Yield the token ids of each text with an end of text, and of each conversation as the base lays it out."""
    with Templates(tokenizer) as templates:
        for _, text, chat in documents_of(reading):
            if chat is None:
                yield [*encoder_of(tokenizer).encode([text])[0], tokenizer.eos_token_id]
            elif (laid := templates.document(chat)) is not None:
                yield laid[0]
        for why, count in templates.laid.skipped.items():
            reading.account.dropped[f"conversations left out: {why}"] += count


def _size(path: Path) -> int:
    """Return the bytes of a file or of those in a folder; 0 for addresses and globs."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def head(tokenizer: Any, paths: Sequence[Path], tokens: int, length: int = 512) -> Ids:
    """Return the first `tokens` ids in blocks int32 [n, m], m ≤ `length`; fewer where there is less text."""
    ids: list[int] = []
    for part in blocks(tokenizer, paths, length):
        ids += part.reshape(-1).tolist()
        if len(ids) >= tokens:
            break
    size = min(length, max(1, len(ids)))
    return np.asarray(ids[: max(size, tokens // size * size)], dtype=np.int32)[: len(ids) // size * size].reshape(
        -1, size
    )


def check_enough(tokenizer: Any, paths: Sequence[Path], tokens: int, vocabulary: int) -> None:
    """Raise `Invalid` unless the texts have `tokens` tokens, and ids that a model of `vocabulary` tokens knows."""
    names, found, largest = ", ".join(str(path) for path in paths), 0, -1
    for part in blocks(tokenizer, paths):
        found += part.size
        largest = max(largest, int(part.max()))
        if found >= tokens:
            break
    if found < tokens:
        raise Invalid(
            f"the probe text {names} has {found} tokens: scores of experts would be chance; give at least {tokens} tokens "
            "of the domain",
            reason=reasons_pb2.REASON_SELECTION_FAILED,
        )
    if largest >= vocabulary:
        raise Invalid(
            f"the tokenizer gives the id {largest}, but the model knows {vocabulary} tokens: it belongs to another model; "
            "put the tokenizer of this base beside its weights",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )


def existing(path: Path) -> Path:
    """Return the path if it is a file. Raises `NotFound`."""
    if not path.is_file():
        raise NotFound(f"there is no file {path}")
    return path
