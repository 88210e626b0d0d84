"""Text files as blocks of token ids, a piece at a time: memory does not depend on how long the text is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from connito.errors import Invalid, NotFound
from connito.v1 import reasons_pb2

Ids = npt.NDArray[np.int32]
CHUNK_CHARACTERS = 1 << 18


def blocks(
    tokenizer: Any, paths: Sequence[Path], length: int = 512, progress: Callable[[float], None] | None = None
) -> Iterator[Ids]:
    """Yield arrays int32 [n, length] of the texts in a row, an end-of-text token behind each, and what is left as [1,
    rest].

    Files are cut at line ends into pieces that are tokenised by themselves. `progress` gets the share of bytes read.
    """
    total, done = max(1, sum(existing(path).stat().st_size for path in paths)), 0
    ids: list[int] = []
    for path in paths:
        with path.open(encoding="utf-8", errors="replace") as file:
            while piece := file.read(CHUNK_CHARACTERS):
                piece += file.readline()
                ids += tokenizer(piece, verbose=False, add_special_tokens=False).input_ids
                count = len(ids) // length * length
                if count:
                    yield np.asarray(ids[:count], dtype=np.int32).reshape(-1, length)
                    ids = ids[count:]
                done += len(piece.encode())
                if progress is not None:
                    progress(min(1.0, done / total))
        ids.append(tokenizer.eos_token_id)
    if len(ids) > 1:
        yield np.asarray(ids, dtype=np.int32).reshape(1, -1)


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
        what = "is empty" if found <= len(paths) else f"has {found} tokens"
        raise Invalid(
            f"the probe text {names} {what}: scores of experts would be chance; give at least {tokens} tokens of the domain",
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
