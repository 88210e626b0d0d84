"""Text files as sequences to decide and measure on."""

from __future__ import annotations

import datetime
import hashlib
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from connito.data.encoding import encoder_of
from connito.data.reading.texts import read_texts
from connito.errors import Invalid
from connito.render import formats
from connito.runtime.progress import tell
from connito.wire.hashing import hash_fields

if TYPE_CHECKING:
    import numpy.typing as npt

LENGTH = 128


def cut_sequences(tokenizer: Any, texts: Sequence[Path]) -> npt.NDArray[Any]:
    """Return the texts in a row as int32 [n, LENGTH + 1], or shorter where there is little text."""
    tell(f"reading {', '.join(path.name for path in map(Path, texts))}")
    ids = array("i")
    for text in read_texts(texts):
        ids.extend([*encoder_of(tokenizer).encode([text])[0], tokenizer.eos_token_id])
    length = min(LENGTH + 1, len(ids) // 2)
    if length < 8:
        raise Invalid(
            f"{', '.join(map(str, texts))} hold {formats.count(len(ids), 'token')}, too few to measure on: give more text"
        )
    return np.asarray(ids[: len(ids) // length * length], dtype=np.int32).reshape(-1, length)


def cut_by_domain(tokenizer: Any, texts: Mapping[str, Path]) -> dict[str, npt.NDArray[Any]]:
    """Return `cut_sequences` of each domain's file."""
    return {name: cut_sequences(tokenizer, [path]) for name, path in texts.items()}


def halves(sequences: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return every other sequence to decide on, and the rest to measure on."""
    return sequences[::2], sequences[1::2]


def digests(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file, or over the texts of what is more than a file."""
    return [_digest(path) for path in paths]


def _digest(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    state = hashlib.sha256()
    for text in read_texts([path]):
        state.update(hash_fields(b"connito.v1.texts", text))
    return state.hexdigest()


def now_iso() -> str:
    """Return the time as records have it."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
