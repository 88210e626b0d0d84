"""Documents packed into rows of one length, each on its own: where it begins, and which of its tokens count, go along.

A row is an array of records, so that it is sliced, drawn and hashed like a row of token ids. `position` counts from 0 in every
document and is −1 in what fills a row up; `counts` marks the tokens whose prediction is learned and measured.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connito.data.corpus import Corpus, too_short

ROW = np.dtype([("token", "<i4"), ("position", "<i4"), ("counts", "?")])
PADDING = -1
# A table of token ids, int32 [n, L + 1], or the same of records with documents apart.
Rows = NDArray[Any]
_Ints = NDArray[np.int64]


def pack(corpus: Corpus, length: int) -> Rows:
    """Return the documents of a corpus as records of `ROW`, [n, length + 1].

    A document that fits into a row is never cut; a longer one is read in pieces of length + 1 tokens that share one, so that
    every token but the first is predicted once. Pieces are put by decreasing length where the least room is left (best-fit
    packing, Ding et al. 2024). Pieces in which nothing counts are left out. Deterministic. Raises `Invalid` with the
    numbers when nothing is left.
    """
    corpus = corpus.complete()
    counts = np.ones(len(corpus.tokens), np.bool_) if corpus.loss is None else corpus.loss
    starts, sizes = _pieces(corpus.offsets, length, counts)
    if len(starts) == 0:
        raise too_short(corpus, length)
    row, begin, total = _places(sizes, length + 1)
    rows = np.zeros((total, length + 1), ROW)
    rows["position"] = PADDING
    within = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    target, source = np.repeat(row * (length + 1) + begin, sizes) + within, np.repeat(starts, sizes) + within
    flat = rows.reshape(-1)
    flat["token"][target] = corpus.tokens[source]
    flat["position"][target] = within
    # The first token of a piece is not predicted: there is nothing before it, or it was in the piece before.
    flat["counts"][target] = counts[source] & (within > 0)
    return rows


def tokens_of(rows: Rows) -> NDArray[np.int32]:
    """Return the token ids of rows of either kind."""
    return np.asarray(rows["token"] if rows.dtype == ROW else rows, np.int32)


def text_of(rows: Rows) -> NDArray[np.bool_]:
    """Return which tokens of rows of either kind are text, not there to fill a row up."""
    return np.asarray(rows["position"] != PADDING) if rows.dtype == ROW else np.ones(rows.shape, np.bool_)


def content_of(rows: Rows) -> bytes:
    """Return the bytes by which rows of either kind are told apart, the same on every machine."""
    return np.ascontiguousarray(rows, None if rows.dtype == ROW else np.dtype("<i4")).tobytes()


def counted(rows: Rows) -> _Ints:
    """Return how many predictions count in each row [..., L + 1] of either kind."""
    if rows.dtype == ROW:
        return np.asarray(rows["counts"][..., 1:].sum(axis=-1), np.int64)
    return np.full(rows.shape[:-1], rows.shape[-1] - 1, np.int64)


def apart(rows: Rows) -> tuple[Rows, _Ints]:
    """Return every document of records [n, L + 1] in a row of its own [m, longest], and the row that it was in [m].

    For models in which documents of one row would see each other.
    """
    n, width = rows.shape
    inside = rows["position"] != PADDING
    first = rows["position"] == 0
    document = np.cumsum(first.reshape(-1)) - 1
    owner = np.repeat(np.arange(n), width)[first.reshape(-1)]
    alone = np.zeros((len(owner), int(rows["position"].max()) + 1), ROW)
    alone["position"] = PADDING
    kept = rows.reshape(-1)[inside.reshape(-1)]
    alone[document[inside.reshape(-1)], kept["position"]] = kept
    return alone, owner


def _pieces(offsets: _Ints, length: int, counts: NDArray[np.bool_]) -> tuple[_Ints, _Ints]:
    """Return (first token, number of tokens) of every piece in which something counts."""
    sizes = np.diff(offsets)
    number = np.maximum(0, (sizes - 2 + length) // length)
    document = np.repeat(np.arange(len(sizes)), number)
    place = np.arange(len(document)) - np.repeat(np.cumsum(number) - number, number)
    starts = offsets[document] + place * length
    lengths = np.minimum(length + 1, offsets[document + 1] - starts)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    kept = sums[starts + lengths] > sums[starts + 1]
    return starts[kept], lengths[kept]


def _places(sizes: _Ints, width: int) -> tuple[_Ints, _Ints, int]:
    """Return each piece's row and place in it, and the number of rows. Rows are in the order of their first piece."""
    row, begin = np.zeros(len(sizes), np.int64), np.zeros(len(sizes), np.int64)
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    rows = 0
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        at = bisect_left(rooms, size)
        room = rooms[at] if at < len(rooms) else width
        if at < len(rooms):
            mine = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        else:
            mine, rows = rows, rows + 1
        row[piece], begin[piece], left = mine, width - room, room - size
        # A piece has two tokens at least.
        if left > 1:
            if not by_room.get(left):
                insort(rooms, left)
            by_room.setdefault(left, []).append(mine)
    _, first = np.unique(row, return_index=True)
    order = np.empty(rows, np.int64)
    order[np.argsort(first, kind="stable")] = np.arange(rows)
    return order[row], begin, rows
