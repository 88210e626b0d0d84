"""Sequences of a corpus as a run reads them, and each miner's share of them in every cycle.

The training text is gone through in epochs: nothing is given out again before everything was given out once. All of it
follows from the log, so that anybody can tell which text a miner had.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from connito.data.corpus import Corpus
from connito.data.packing import Rows, pack
from connito.errors import Invalid
from connito.protocol.findings import DOCUMENTS_APART
from connito.v1 import reasons_pb2 as reasons
from connito.v1.run_pb2 import RunSpec
from connito.wire.facts import RunFacts
from connito.wire.hashing import hash_fields

BATCH_TAG = b"connito.v1.batches"


def sequences(corpus: Corpus, spec: RunSpec) -> Rows:
    """Return a corpus as rows [n, L + 1] of the run's length: documents apart, or all in a row under older rules.

    Raises `Invalid` when there is not even one.
    """
    length = spec.training.sequence_length
    return pack(corpus, length) if spec.protocol_version >= DOCUMENTS_APART else corpus.sequences(length)


def miners_of(facts: RunFacts, cycle: int) -> list[str]:
    """Return the miners that share the text of a cycle. Validators are expected in the train window too."""
    return sorted(set(facts.window("train", cycle).expected) & set(facts.enrolled))


def miner_batches(facts: RunFacts, cycle: int, miner: str, train: Rows, replay: Rows | None = None) -> Rows:
    """Return one miner's training batches of a cycle: [steps, batch, L + 1] of `train`'s kind.

    `train` and `replay` are the `sequences` of those corpora. A replay share of the slots, spread evenly, comes from
    `replay`. See `share_of` for which rows are whose.
    """
    before = sum(len(miners_of(facts, earlier)) for earlier in range(1, cycle))
    return batches_of(facts.require_spec(), cycle, miner, miners_of(facts, cycle), before, train, replay)


def batches_of(
    spec: RunSpec, cycle: int, miner: str, miners: Sequence[str], before: int, train: Rows, replay: Rows | None = None
) -> Rows:
    """Return `miner_batches` for given miners, after `before` shares were given out in earlier cycles."""
    policy = spec.training
    total = policy.local_steps * policy.batch_sequences
    replayed = _replay_slots(total, policy.replay_share if replay is not None else 0.0)
    chosen = np.empty((total, train.shape[1]), train.dtype)
    for kind, rows, slots in (("train", train, ~replayed), ("replay", replay, replayed)):
        if rows is not None and slots.any():
            key = (kind, spec.run)
            chosen[slots] = rows[share_of(len(rows), int(slots.sum()), cycle, miner, miners, before, key)]
    return chosen.reshape(policy.local_steps, policy.batch_sequences, train.shape[1])


def share_of(
    count: int, needed: int, cycle: int, miner: str, miners: Sequence[str], before: int, key: tuple[str, ...]
) -> NDArray[np.int64]:
    """Return the numbers, below `count`, of the `needed` rows that a miner reads in a cycle.

    The m miners of a cycle take every m-th of the next m · needed rows in the run's order, which is a new permutation for
    each epoch; `before` shares of as many rows were given out in earlier cycles. So miners are apart, unless they need more
    than there is. A miner that came after the cycle began draws a sample of its own: the others' shares stand already.
    """
    if miner not in miners:
        return np.resize(_permutation(count, "sample", *key, cycle, miner), needed)
    place = before * needed + sorted(miners).index(miner) + len(miners) * np.arange(needed)
    epochs, within = np.divmod(place, count)
    chosen = np.empty(needed, np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        chosen[here] = _permutation(count, "epoch", *key, epoch)[within[here]]
    return chosen


def _permutation(count: int, *key: str | int) -> NDArray[np.int64]:
    """Return a permutation of 0..count-1 keyed by `key`.

    From raw Philox words, whose stream numpy keeps stable over versions, unlike that of `Generator.permutation`.
    """
    seed = int.from_bytes(hash_fields(BATCH_TAG, *key)[:16], "big")
    words = np.random.Philox(key=seed).random_raw(count)
    return np.argsort(words, kind="stable")


def _replay_slots(total: int, share: float) -> NDArray[np.bool_]:
    """Return a mask of the replay slots among `total`: bool [total], evenly spread, `floor(total · share)` of them."""
    if not 0.0 <= share < 1.0:
        raise Invalid(f"the replay share is {share}; it must be at least 0 and below 1", reason=reasons.REASON_BAD_SPEC)
    counts = np.floor(np.arange(total + 1) * share + 1e-9)
    return np.asarray(np.diff(counts) > 0)
