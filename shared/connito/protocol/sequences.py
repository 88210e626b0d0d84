"""Sequences of a corpus as a run reads them, and each miner's share of them in every cycle.

The training text is gone through in epochs: nothing is given out again before everything was given out once. All of it
follows from the log, so that anybody can tell which text a miner had. Which of a cycle's text is whose follows from the head
before the cycle, so that nobody can train from it a cycle earlier, to have the miner called a copier.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from connito.data.corpus import Corpus
from connito.data.packing import Rows, pack
from connito.errors import Invalid
from connito.protocol import progress
from connito.v1 import reasons_pb2 as reasons
from connito.v1.run_pb2 import RunSpec, TrainPolicy
from connito.wire.facts import RunFacts
from connito.wire.hashing import hash_fields

BATCH_TAG = b"connito.v1.batches"


def sequences(corpus: Corpus, spec: RunSpec) -> Rows:
    """Return a corpus as rows [n, L + 1] of the run's length: documents apart.

    Raises `Invalid` when there is not even one.
    """
    return pack(corpus, spec.training.sequence_length)


def replays(spec: RunSpec) -> bool:
    """Return whether miners may mix general text into what they train on: a run may begin without, and take it up."""
    return bool(spec.replay.artifact.digest)


def miners_of(facts: RunFacts, cycle: int) -> list[str]:
    """Return the miners that share the text of a cycle. Validators are expected in the train window too."""
    return sorted(set(facts.window("train", cycle).expected) & set(facts.enrolled))


def miner_batches(facts: RunFacts, cycle: int, miner: str, train: Rows, replay: Rows | None = None) -> Rows:
    """Return one miner's training batches of a cycle: [steps, batch, L + 1] of `train`'s kind.

    `train` and `replay` are the `sequences` of those corpora. A replay share of the slots, spread evenly, comes from
    `replay`. See `share_of` for which rows are whose.
    """
    given = (0, 0)
    for earlier in range(1, cycle):
        mask, count = _replay_slots(progress.training(facts, earlier), replay), len(miners_of(facts, earlier))
        given = (given[0] + count * int((~mask).sum()), given[1] + count * int(mask.sum()))
    policy = progress.training(facts, cycle)
    head = facts.head(cycle)
    turn = "" if head is None else head.message.checkpoint
    return batches_of(facts.run, policy, cycle, miner, miners_of(facts, cycle), train, turn, replay, given)


def batches_of(
    run: str,
    policy: TrainPolicy,
    cycle: int,
    miner: str,
    miners: Sequence[str],
    train: Rows,
    turn: str,
    replay: Rows | None = None,
    given: tuple[int, int] = (0, 0),
) -> Rows:
    """Return `miner_batches` for given miners and policy, after `given` rows of `train` and of `replay` were given out."""
    replayed = _replay_slots(policy, replay)
    chosen = np.empty((len(replayed), train.shape[1]), train.dtype)
    for kind, rows, slots, before in (("train", train, ~replayed, given[0]), ("replay", replay, replayed, given[1])):
        if rows is not None and slots.any():
            key = (kind, run)
            chosen[slots] = rows[share_of(len(rows), int(slots.sum()), cycle, miner, miners, before, key, turn)]
    return chosen.reshape(policy.local_steps, policy.batch_sequences, train.shape[1])


def share_of(
    count: int,
    needed: int,
    cycle: int,
    miner: str,
    miners: Sequence[str],
    before: int,
    key: tuple[str, ...],
    turn: str,
) -> NDArray[np.int64]:
    """Return the numbers, below `count`, of the `needed` rows that a miner reads in a cycle.

    The m miners of a cycle share the next m · needed rows in the run's order, which is a new permutation for each epoch, in
    the order that `turn` draws; `before` rows were given out in earlier cycles. So miners are
    apart, unless they need more than there is. A miner that came after the cycle began draws a sample of its own: the others'
    shares stand already.
    """
    if miner not in miners:
        return np.resize(_permutation(count, "sample", *key, cycle, miner, turn), needed)
    place = sorted(miners).index(miner) + len(miners) * np.arange(needed)
    place = before + _permutation(len(miners) * needed, "turn", *key, cycle, turn)[place]
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


def _replay_slots(policy: TrainPolicy, replay: Rows | None) -> NDArray[np.bool_]:
    """Return a mask of the replay slots among a cycle's: bool [steps · batch], evenly spread, none without replay text."""
    total, share = policy.local_steps * policy.batch_sequences, policy.replay_share if replay is not None else 0.0
    if not 0.0 <= share < 1.0:
        raise Invalid(f"the replay share is {share}; it must be at least 0 and below 1", reason=reasons.REASON_BAD_SPEC)
    counts = np.floor(np.arange(total + 1) * share + 1e-9)
    return np.asarray(np.diff(counts) > 0)
