"""Tokenised text as everybody in a run shares it: documents in one array, packed into sequences, cut into batches."""

from __future__ import annotations

import mmap
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
from connito.wire.hashing import hash_fields

BATCH_TAG = b"connito.v1.batches"
Tokens = NDArray[np.int32]
# Bytes of tokens from which a corpus that is being made lies on disk.
_IN_MEMORY = 1 << 24


@dataclass(frozen=True)
class Corpus:
    """Documents of one domain as token ids.

    tokens: int32 [T], all documents one after the other. offsets: int64 [D + 1], document d is
    `tokens[offsets[d]:offsets[d + 1]]`. metadata: `domain`, `split` (probe, train, holdout), `tokenizer` (digest),
    `separator` (token id put behind every document when packing) and whatever else the maker wants to say.
    """

    tokens: Tokens
    offsets: NDArray[np.int64]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, offsets = self.tokens, self.offsets
        if tokens.dtype != np.int32 or tokens.ndim != 1 or offsets.dtype != np.int64 or offsets.ndim != 1:
            raise _broken("tokens must be int32 [T] and offsets int64 [D + 1]")
        if len(offsets) < 1 or offsets[0] != 0 or offsets[-1] != len(tokens) or np.any(np.diff(offsets) < 0):
            raise _broken("offsets must rise from 0 to the number of tokens")
        if len(tokens) and int(tokens.min()) < 0:
            raise _broken("a token id is negative")

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int]], metadata: Mapping[str, str] | None = None) -> Corpus:
        """Build from token ids per document, which are taken one at a time; many tokens are kept on disk."""
        ends = array("q", [0])
        with tempfile.SpooledTemporaryFile(_IN_MEMORY) as file:
            for document in documents:
                file.write(np.fromiter(document, np.int32, len(document)).data)
                ends.append(ends[-1] + len(document))
            if 4 * ends[-1] > _IN_MEMORY:
                file.flush()
                tokens = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.int32)
            else:
                file.seek(0)
                tokens = np.frombuffer(file.read(), np.int32)
        return cls(tokens, np.frombuffer(ends, np.int64), dict(metadata or {}))

    @classmethod
    def load(cls, source: Path | str | bytes) -> Corpus:
        """Read a corpus artifact. Raises `Invalid` when it is not one."""
        arrays, metadata = read_tensors(source)
        if set(arrays) != {"tokens", "offsets"}:
            raise _broken(f"it holds {', '.join(sorted(arrays)[:4]) or 'nothing'} instead of tokens and offsets")
        return cls(arrays["tokens"], arrays["offsets"], metadata)

    def to_bytes(self) -> bytes:
        """Return the artifact: safetensors, the same bytes for the same corpus."""
        return tensor_bytes({"tokens": self.tokens, "offsets": self.offsets}, self.metadata)

    def save(self, path: Path) -> None:
        """Write the artifact, without a second copy of it in memory."""
        arrays: dict[str, NDArray[Any]] = {"tokens": self.tokens, "offsets": self.offsets}
        with TensorWriter(path, layout_of(arrays), self.metadata) as writer:
            for name in writer.names:
                writer.write(name, arrays[name])

    @property
    def domain(self) -> str:
        """Return the domain of the text."""
        return self.metadata.get("domain", "")

    @property
    def documents(self) -> int:
        """Return the number of documents."""
        return len(self.offsets) - 1

    def document(self, index: int) -> Tokens:
        """Return token ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def sequences(self, length: int, separator: int | None = None) -> Tokens:
        """Pack all documents, each followed by the separator, into rows: int32 [n, length + 1].

        A row predicts `length` tokens. Rows do not overlap; what is left at the end is dropped. Without `separator`
        the one in the metadata is used. Raises `Invalid` with the numbers when there is not even one row.
        """
        if separator is None:
            if "separator" not in self.metadata:
                raise _broken("it names no separator token; pass one")
            separator = int(self.metadata["separator"])
        packed = np.insert(self.tokens, self.offsets[1:], np.int32(separator))
        count = len(packed) // (length + 1)
        if count == 0:
            raise Invalid(
                f"the {self._name} has {len(self.tokens)} tokens, fewer than one sequence of {length} needs; add text "
                "or train on shorter sequences",
                reason=reasons.REASON_BAD_SPEC,
            )
        return np.ascontiguousarray(packed[: count * (length + 1)].reshape(count, length + 1), np.int32)

    def miner_batches(
        self,
        run: str,
        cycle: int,
        miner: str,
        expected: Sequence[str],
        steps: int,
        batch: int,
        length: int,
        *,
        replay: Corpus | None = None,
        replay_share: float = 0.0,
        separator: int | None = None,
    ) -> Tokens:
        """Return one miner's training batches of one cycle: int32 [steps, batch, length + 1], the same for whoever recomputes it.

        Miners in `expected` share a permutation keyed by run and cycle and take every m-th of it, so their text is
        disjoint (unless there are more miners than sequences); a newcomer draws a sample of its own. Whoever needs
        more than its slice goes through it again. A `replay_share` of the slots, spread evenly, comes from `replay`.
        """
        total = steps * batch
        replayed = _replay_slots(total, replay_share if replay is not None else 0.0)
        own = self.sequences(length, separator)
        rows = own[_slice(len(own), run, cycle, miner, expected, int(np.count_nonzero(~replayed)))]
        chosen = np.empty((total, length + 1), np.int32)
        chosen[~replayed] = rows
        if replay is not None and replayed.any():
            general = replay.sequences(length, separator)
            picks = _permutation(len(general), "replay", run, cycle, miner)
            chosen[replayed] = general[np.resize(picks, int(replayed.sum()))]
        return chosen.reshape(steps, batch, length + 1)

    @property
    def _name(self) -> str:
        return " ".join(part for part in (self.domain, self.metadata.get("split", ""), "corpus") if part)


def _broken(detail: str) -> Invalid:
    return Invalid(f"this is not a usable corpus: {detail}", reason=reasons.REASON_MALFORMED)


def _permutation(count: int, *key: str | int) -> NDArray[np.int64]:
    """Return a permutation of 0..count-1 keyed by `key`.

    From raw Philox words, whose stream numpy keeps stable over versions, unlike that of `Generator.permutation`.
    """
    seed = int.from_bytes(hash_fields(BATCH_TAG, *key)[:16], "big")
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(words, kind="stable")


def _slice(count: int, run: str, cycle: int, miner: str, expected: Sequence[str], needed: int) -> NDArray[np.int64]:
    miners = sorted(set(expected))
    if miner in miners and count >= len(miners):
        mine = _permutation(count, "slices", run, cycle)[miners.index(miner) :: len(miners)]
    else:
        mine = _permutation(count, "sample", run, cycle, miner)
    return np.resize(mine, needed)


def _replay_slots(total: int, share: float) -> NDArray[np.bool_]:
    """Return a mask of the replay slots among `total`: bool [total], evenly spread, `floor(total · share)` of them."""
    if not 0.0 <= share < 1.0:
        raise Invalid(f"the replay share is {share}; it must be at least 0 and below 1", reason=reasons.REASON_BAD_SPEC)
    counts = np.floor(np.arange(total + 1) * share + 1e-9)
    return np.asarray(np.diff(counts) > 0)
