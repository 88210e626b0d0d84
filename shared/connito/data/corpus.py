"""Tokenised text as everybody in a run shares it: documents in one array, and which of their tokens are to be learned."""

from __future__ import annotations

import mmap
import re
import tempfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connito.data.tensors import TensorWriter, layout_of, read_tensors, tensor_bytes
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

Tokens = NDArray[np.int32]
# Bytes of tokens from which a corpus that is being made lies on disk.
_IN_MEMORY = 1 << 24
# Metadata: documents end as they are written, and nothing is put behind them.
ENDS, WHOLE = "ends", "in the documents"
# What a corpus may say of itself: entries, and characters of a name and of a value.
_MAX_ENTRIES, _MAX_KEY, _MAX_VALUE = 64, 128, 16_384
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}", re.ASCII)


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain as token ids.

    tokens: int32 [T], all documents one after the other. offsets: int64 [D + 1], document d is
    `tokens[offsets[d]:offsets[d + 1]]`. metadata: `domain`, `split` (probe, train, holdout), `tokenizer` (digest),
    `separator` (token id put behind every document when packing, unless `ends` says that they have their own) and whatever
    else the maker wants to say. loss: bool [T], the tokens whose prediction counts; None: all of them.
    """

    tokens: Tokens
    offsets: NDArray[np.int64]
    metadata: Mapping[str, str] = field(default_factory=dict)
    loss: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        tokens, offsets, loss = self.tokens, self.offsets, self.loss
        if tokens.dtype != np.int32 or tokens.ndim != 1 or offsets.dtype != np.int64 or offsets.ndim != 1:
            raise broken("tokens must be int32 [T] and offsets int64 [D + 1]")
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(np.diff(offsets) < 0):
            raise broken("offsets must rise from 0 to the number of tokens")
        if len(tokens) and int(tokens.min()) < 0:
            raise broken("a token id is negative")
        if loss is not None and (loss.dtype != np.bool_ or loss.shape != tokens.shape or not self.whole):
            raise broken("loss must be bool [T], one value for each token, of documents that have their own ends")

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int]], metadata: Mapping[str, str] | None = None) -> Corpus:
        """Build from token ids per document, which are taken one at a time; many tokens are kept on disk."""
        return cls.from_masked(((ids, None) for ids in documents), metadata)

    @classmethod
    def from_masked(
        cls,
        documents: Iterable[tuple[Sequence[int], Sequence[bool] | None]],
        metadata: Mapping[str, str] | None = None,
    ) -> Corpus:
        """Build from token ids and as many marks of what counts per document; None: all of it.

        A corpus in which all documents count as a whole has no mask.
        """
        ends, masked = array("q", [0]), False
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as tokens, tempfile.SpooledTemporaryFile(_IN_MEMORY) as loss:
            for ids, mask in documents:
                if mask is not None and len(mask) != len(ids):
                    raise broken("loss has not one value for each token")
                tokens.write(np.fromiter(ids, np.int32, len(ids)).data)
                loss.write((np.ones(len(ids), np.bool_) if mask is None else np.asarray(mask, np.bool_)).data)
                ends.append(ends[-1] + len(ids))
                masked |= mask is not None
            marks = _kept(loss, ends[-1]).view(np.bool_) if masked else None
            kept = _kept(tokens, 4 * ends[-1]).view(np.int32)
        return cls(kept, np.frombuffer(ends, np.int64), dict(metadata or {}), marks)

    @classmethod
    def load(cls, source: Path | str | bytes, *, mmap: bool = False) -> Corpus:
        """Read a corpus artifact, or map its file. Raises `Invalid` when it is not one, whoever made it."""
        arrays, metadata = read_tensors(source, mmap=mmap)
        _check_metadata(metadata)
        if set(arrays) - {"loss"} != {"tokens", "offsets"}:
            raise broken(f"it holds {', '.join(sorted(arrays)[:4]) or 'nothing'} instead of tokens and offsets")
        loss = arrays.get("loss")
        if loss is not None and loss.dtype != np.uint8:
            raise broken("loss must be uint8 [T]")
        return cls(arrays["tokens"], arrays["offsets"], metadata, None if loss is None else loss != 0)

    def to_bytes(self) -> bytes:
        """Return the artifact: safetensors, the same bytes for the same corpus."""
        return tensor_bytes(self._arrays, self.metadata)

    def save(self, path: Path) -> None:
        """Write the artifact, without a second copy of it in memory."""
        arrays = self._arrays
        with TensorWriter(path, layout_of(arrays), self.metadata) as writer:
            for name in writer.names:
                writer.write(name, arrays[name])

    @property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        loss = {} if self.loss is None else {"loss": self.loss.view(np.uint8)}
        return {"tokens": self.tokens, "offsets": self.offsets, **loss}

    @property
    def domain(self) -> str:
        """Return the domain of the text."""
        return self.metadata.get("domain", "")

    @property
    def name(self) -> str:
        """Return words for messages: domain and split."""
        return " ".join(part for part in (self.domain, self.metadata.get("split", ""), "corpus") if part)

    @property
    def whole(self) -> bool:
        """Return whether the documents have their own ends, so that no separator belongs behind them."""
        return self.metadata.get(ENDS) == WHOLE

    @property
    def separator(self) -> int | None:
        """Return the token id that belongs behind every document; None where none is named. Raises `Invalid`."""
        text = self.metadata.get("separator")
        if text is None:
            return None
        if not _TOKEN_ID.fullmatch(text) or int(text) > np.iinfo(np.int32).max:
            raise broken(f"its separator {text[:24]!a} is not the number of a token")
        return int(text)

    @property
    def largest(self) -> int:
        """Return the largest token id that a reader meets; −1 where there is none."""
        behind = -1 if self.whole or self.separator is None else self.separator
        return max(behind, int(self.tokens.max(initial=-1)))

    @property
    def documents(self) -> int:
        """Return the number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> Tokens:
        """Return token ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def complete(self) -> Corpus:
        """Return the same with every document's end in it: the separator in the metadata, behind each."""
        if self.whole:
            return self
        separator = self.separator
        if separator is None:
            raise broken("it names no separator token")
        tokens = np.insert(self.tokens, self.offsets[1:], np.int32(separator))
        return Corpus(tokens, self.offsets + np.arange(len(self.offsets)), {**self.metadata, ENDS: WHOLE})


def _check_metadata(metadata: Mapping[str, str]) -> None:
    if len(metadata) > _MAX_ENTRIES:
        raise broken(f"it says {len(metadata)} things of itself, more than {_MAX_ENTRIES}")
    for name, value in metadata.items():
        if len(name) > _MAX_KEY or len(value) > _MAX_VALUE:
            raise broken(f"what it says under {name[:24]!a} is longer than {_MAX_VALUE} characters")


def _kept(file: tempfile.SpooledTemporaryFile[bytes], size: int) -> NDArray[np.uint8]:
    """Return what was written: in memory, or mapped from the disk where it is much."""
    if size > _IN_MEMORY:
        file.flush()
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    file.seek(0)
    return np.frombuffer(file.read(), np.uint8)


def broken(detail: str) -> Invalid:
    """Return the error for something that is no corpus."""
    return Invalid(f"this is not a usable corpus: {detail}", reason=reasons.REASON_MALFORMED)


def check_vocabulary(largest: int, vocabulary: int, what: str) -> None:
    """Raise `Invalid` if a token id is beyond the embeddings of the model that is to read it."""
    if largest >= vocabulary:
        raise Invalid(
            f"the {what} holds the token {largest}, and the base has {vocabulary}; tokenise it with the base's own tokenizer",
            reason=reasons.REASON_BAD_SPEC,
        )


def too_short(corpus: Corpus, length: int) -> Invalid:
    """Return the error for a corpus without a single sequence."""
    return Invalid(
        f"the {corpus.name} has {len(corpus.tokens)} tokens, fewer than one sequence of {length} needs; add text "
        "or train on shorter sequences",
        reason=reasons.REASON_BAD_SPEC,
    )
