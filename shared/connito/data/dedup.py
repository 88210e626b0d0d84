"""Near-duplicates: documents that share most of their word 5-grams.

MinHash signatures (Broder, 1997) put likely pairs into the same bucket of a locality-sensitive hash; the pairs found
there are then compared exactly. Decontamination asks something else, how much of a training document occurs anywhere
in the hold-out, and looks that up exactly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
BANDS, ROWS = 16, 4

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


def shingles(documents: Sequence[str]) -> list[Shingles]:
    """Return distinct word 5-grams of each document as sorted 64-bit hashes. Case and punctuation do not matter.

    A document of fewer words is one shingle. Collisions happen at random, about once in 2⁶⁴ pairs.
    """
    known: dict[str, int] = {}
    found = []
    for document in documents:
        words = _WORD.findall(document.lower())
        numbers = np.fromiter((known.setdefault(word, len(known)) for word in words), np.uint64, len(words))
        found.append(np.unique(_grams(numbers)))
    return found


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


def _buckets(of_document: Shingles, salts: Shingles) -> list[bytes]:
    """Return one key per band of the MinHash signature."""
    signature = np.full(len(salts), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(of_document), 4096):  # bounds the memory that a very long document takes
        part = of_document[start : start + 4096]
        # Odd multiples are a permutation of 64-bit numbers; their high bits order them at random.
        np.minimum(
            signature, ((part[None, :] ^ salts[:, None]) * (salts[:, None] | np.uint64(1))).min(1), out=signature
        )
    return [signature[band * ROWS : (band + 1) * ROWS].tobytes() for band in range(BANDS)]


def jaccard(one: Shingles, other: Shingles) -> float:
    """Return the Jaccard index: shared shingles over all shingles."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def deduplicate(documents: Sequence[str], threshold: float = 0.7) -> Deduplicated:
    """Keep the first of documents that are equal up to case and punctuation, or share `threshold` of their 5-grams.

    With 16 bands of 4 rows, a pair at 0.7 is looked at with probability 0.99, at 0.8 with 0.9998.
    """
    salts = _mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    grams = shingles(documents)
    buckets: list[dict[bytes, list[int]]] = [{} for _ in range(BANDS)]
    texts: dict[bytes, int] = {}
    twin: dict[int, int] = {}
    kept: list[int] = []
    exact = near = 0
    for index, gram in enumerate(grams):
        raw = gram.tobytes()
        if raw in texts:
            exact += 1
            twin[index] = texts[raw]
            continue
        keys = _buckets(gram, salts)
        candidates = {other for band, key in enumerate(keys) for other in buckets[band].get(key, ())}
        like = next((other for other in sorted(candidates) if jaccard(gram, grams[other]) >= threshold), None)
        if like is not None:
            near += 1
            twin[index] = like
            continue
        texts[raw] = index
        kept.append(index)
        for band, key in enumerate(keys):
            buckets[band].setdefault(key, []).append(index)
    return Deduplicated(kept, exact, near, twin)


def contaminated(documents: Sequence[str], holdout: Sequence[str], threshold: float = 0.5) -> list[int]:
    """Return indices of documents of whose 5-grams at least `threshold` occur somewhere in the hold-out."""
    grams = shingles([*documents, *holdout])
    if not holdout:
        return []
    held_out = np.unique(np.concatenate(grams[len(documents) :]))
    found = []
    for index, gram in enumerate(grams[: len(documents)]):
        place = np.minimum(np.searchsorted(held_out, gram), len(held_out) - 1)
        if np.count_nonzero(held_out[place] == gram) >= threshold * len(gram):
            found.append(index)
    return found
