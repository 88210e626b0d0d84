"""Near-duplicates: documents that share most of their word 5-grams.

MinHash signatures (Broder, 1997) put likely pairs into the same bucket of a locality-sensitive hash; the pairs found
there are then compared exactly. Decontamination asks something else, how much of a training document occurs anywhere
in the hold-out, and looks that up exactly. Texts are read as they are needed: kept in memory are 150 bytes for each
document, whatever its length, and hashes of held-out text lie on disk.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
BANDS, ROWS = 16, 4
# Hashes kept of documents that others are compared with, and of words: both are computed again when they are needed.
_KEPT_BYTES, _KEPT_WORDS = 1 << 24, 1 << 16
# Hashes of held-out text that are sorted in memory at once, 8 bytes each.
_CHUNK = 1 << 20

Shingles = NDArray[np.uint64]

_WORD = re.compile(r"\w+")
_GOLDEN = 0x9E37_79B9_7F4A_7C15


@dataclass(frozen=True)
class Deduplicated:
    """Documents left after de-duplication, by index, and the number removed for each cause.

    `twin` maps each removed document to the kept one that it repeats.
    """

    kept: list[int]
    exact: int
    near: int
    twin: dict[int, int] = field(default_factory=dict)


def shingles(documents: Iterable[str]) -> Iterator[Shingles]:
    """Yield distinct word 5-grams of each document as sorted 64-bit hashes. Case and punctuation do not matter.

    A document of fewer words is one shingle. Collisions happen at random, about once in 2⁶⁴ pairs.
    """
    known: dict[str, int] = {}
    for document in documents:
        words = _WORD.findall(document.lower())
        if len(known) > _KEPT_WORDS:
            known.clear()
        for word in set(words).difference(known):
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        found = np.sort(_grams(np.fromiter(map(known.__getitem__, words), np.uint64, len(words))))
        yield found[np.append(True, found[1:] != found[:-1])]


def _grams(numbers: Shingles) -> Shingles:
    width = min(SHINGLE_WORDS, len(numbers))
    count = len(numbers) - width + 1
    hashed = np.full(count if len(numbers) else 1, np.uint64(width))
    for place in range(width):
        hashed = _mix(hashed ^ _mix(numbers[place : place + count] + np.uint64((place + 1) * _GOLDEN % 2**64)))
    return hashed


def _mix(values: Shingles) -> Shingles:
    """Apply the finaliser of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))


def _keys(of_document: Shingles, salts: Shingles) -> Shingles:
    """Return a hash of the document, in two numbers, then one key per band of its MinHash signature: uint64 [2 + BANDS]."""
    signature = np.full(len(salts), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(of_document), 4096):  # bounds the memory that a very long document takes
        part = of_document[start : start + 4096]
        # Odd multiples are a permutation of 64-bit numbers; their high bits order them at random.
        np.minimum(
            signature, ((part[None, :] ^ salts[:, None]) * (salts[:, None] | np.uint64(1))).min(1), out=signature
        )
    bands = signature.reshape(BANDS, ROWS)
    keys = np.zeros(BANDS, np.uint64)
    for row in range(ROWS):
        keys = _mix(keys ^ bands[:, row])
    whole = np.frombuffer(hashlib.blake2b(of_document.tobytes(), digest_size=16).digest(), np.uint64)
    return np.concatenate([whole, keys])


def _groups(keys: Shingles) -> NDArray[np.int32]:
    """Return for each key the number of its group, -1 for a key that is there once: int32 [n]."""
    order = np.argsort(keys, kind="stable")
    new = np.diff(keys[order], prepend=keys[order[:1]] + np.uint64(1)) != 0
    number = np.cumsum(new) - 1
    alone = np.bincount(number)[number] == 1
    groups = np.empty(len(keys), np.int32)
    groups[order] = np.where(alone, -1, number)
    return groups


def jaccard(one: Shingles, other: Shingles) -> float:
    """Return the Jaccard index: shared shingles over all shingles."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


class _Recent:
    """Shingles of documents by index, the last ones used in memory."""

    def __init__(self, documents: Sequence[str]) -> None:
        self._documents, self._size = documents, 0
        self._kept: OrderedDict[int, Shingles] = OrderedDict()

    def __getitem__(self, index: int) -> Shingles:
        if index not in self._kept:
            self._kept[index] = next(shingles([self._documents[index]]))
            self._size += self._kept[index].nbytes
        self._kept.move_to_end(index)
        found = self._kept[index]
        while self._size > _KEPT_BYTES and len(self._kept) > 1:
            self._size -= self._kept.popitem(last=False)[1].nbytes
        return found


def deduplicate(documents: Sequence[str], threshold: float = 0.7) -> Deduplicated:
    """Keep the first of documents that are equal up to case and punctuation, or share `threshold` of their 5-grams.

    With 16 bands of 4 rows, a pair at 0.7 is looked at with probability 0.99, at 0.8 with 0.9998.
    """
    salts = _mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    keys: Shingles = np.empty((len(documents), 2 + BANDS), np.uint64)
    for index, gram in enumerate(shingles(documents)):
        keys[index] = _keys(gram, salts)
    same = _groups(_mix(keys[:, 0]) ^ keys[:, 1])
    bands = np.stack([_groups(keys[:, 2 + band]) for band in range(BANDS)], 1)
    del keys
    grams = _Recent(documents)
    texts: dict[int, int] = {}
    buckets: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]
    twin: dict[int, int] = {}
    kept: list[int] = []
    exact = near = 0
    for index in range(len(documents)):
        if (first := texts.get(int(same[index]))) is not None:
            exact += 1
            twin[index] = first
            continue
        shared = [(band, int(bands[index, band])) for band in np.flatnonzero(bands[index] >= 0)]
        candidates = {other for band, key in shared for other in buckets[band].get(key, ())}
        like = next((other for other in sorted(candidates) if jaccard(grams[index], grams[other]) >= threshold), None)
        if like is not None:
            near += 1
            twin[index] = like
            continue
        if same[index] >= 0:
            texts[int(same[index])] = index
        kept.append(index)
        for band, key in shared:
            buckets[band].setdefault(key, []).append(index)
    return Deduplicated(kept, exact, near, twin)


class _Held:
    """All hashes of a hold-out, sorted in pieces that lie on disk."""

    def __init__(self, holdout: Iterable[str]) -> None:
        self._pieces: list[Shingles] = []
        waiting: list[Shingles] = []
        size = 0
        for gram in shingles(holdout):
            waiting.append(gram)
            size += len(gram)
            if size > _CHUNK:
                self._write(waiting)
                waiting, size = [], 0
        if waiting:
            self._write(waiting)

    def _write(self, waiting: list[Shingles]) -> None:
        piece = np.unique(np.concatenate(waiting))
        with tempfile.TemporaryFile() as file:  # The mapping keeps the file until it is done with.
            file.write(piece.tobytes())
            file.flush()
            self._pieces.append(np.memmap(file, np.uint64, "r"))

    def share(self, gram: Shingles) -> float:
        """Return the share of a document's hashes that occur in the hold-out."""
        found = np.zeros(len(gram), np.bool_)
        for piece in self._pieces:
            place = np.minimum(np.searchsorted(piece, gram), len(piece) - 1)
            found |= piece[place] == gram
        return float(np.count_nonzero(found)) / len(gram)


def contaminated(documents: Iterable[str], holdout: Iterable[str], threshold: float = 0.5) -> list[int]:
    """Return indices of documents of whose 5-grams at least `threshold` occur somewhere in the hold-out."""
    held = _Held(holdout)
    return [index for index, gram in enumerate(shingles(documents)) if held.share(gram) >= threshold]
