"""Split of held-out sequences into parts for scoring, for the gate and for reports only.

The parts are disjoint, so that a state that was chosen on one of them is still judged by text it was not chosen on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from connito.data.packing import Rows, content_of
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons
from connito.v1 import run_pb2
from connito.wire.hashing import hash_fields

SPLIT_TAG = b"connito.v1.holdout.split"
DRAW_TAG = b"connito.v1.holdout.draw"


@dataclass(frozen=True)
class Subsets:
    """Indices of a hold-out's sequences, each ascending; no index, and no text, is in two of them."""

    score: list[int]
    gate: list[int]
    report: list[int]


def split(sequences: Rows, *, gate: int, report: int, needed: int = 1, domain: str = "") -> Subsets:
    """Split the sequences [n, length + 1] of a hold-out, ids or records, by the SHA-256 of their bytes.

    `report` sequences are reported on, `gate` decide about a candidate, the rest is the pool that the beacon draws
    from; at least `needed` must be left in it. A sequence that occurs twice counts once. Raises `Invalid` (BAD_SPEC)
    with the numbers when there is too little.
    """
    tag = hash_fields(SPLIT_TAG)
    by_digest: dict[bytes, int] = {}
    for index, sequence in enumerate(sequences):
        by_digest.setdefault(hashlib.sha256(tag + content_of(sequence)).digest(), index)
    order = [by_digest[digest] for digest in sorted(by_digest)]
    if len(order) < gate + report + max(needed, 1):
        length = sequences.shape[1] - 1
        missing = gate + report + max(needed, 1) - len(order)
        raise Invalid(
            f"the hold-out{f' of {domain}' if domain else ''} has {len(order)} different sequences of {length} tokens; "
            f"scoring draws {max(needed, 1)}, the gate needs {gate} and the report {report}. Add about "
            f"{missing * (length + 1)} tokens of held-out text, or lower the sequence length or those three numbers",
            reason=reasons.REASON_BAD_SPEC,
        )
    return Subsets(
        score=sorted(order[report + gate :]), gate=sorted(order[report : report + gate]), report=sorted(order[:report])
    )


def subsets(sequences: Rows, spec: run_pb2.RunSpec, domain: str) -> Subsets:
    """Return `split` with the numbers of a run's policy: those for the target when `domain` is it, else for a general
    domain.
    """
    merging, scoring = spec.merging, spec.scoring
    if domain == spec.holdout.domain:
        gate, report, needed = merging.gate_target_sequences, merging.report_target_sequences, scoring.target_sequences
    else:
        gate, report = merging.gate_general_sequences, merging.report_general_sequences
        needed = scoring.general_sequences
    return split(sequences, gate=gate, report=report, needed=needed, domain=domain)


def draw_sequences(
    seed: bytes, domain: str, pool: Sequence[int], count: int, salt: str = "", *, in_order: bool = False
) -> list[int]:
    """Return `count` different indices out of `pool`: those with the smallest SHA-256 under the cycle's seed.

    Without the seed every choice is equally likely; with it everybody gets the same. They come ascending, or with
    `in_order` in the order of their hashes: any beginning of that is a draw too. `salt` gives an independent draw, for
    example per validator. Raises `Invalid` (BAD_SPEC) when the pool is too small.
    """
    if count > len(set(pool)):
        raise Invalid(
            f"cannot draw {count} of {len(set(pool))} held-out sequences of {domain}; hold out more text or lower "
            "scoring.target_sequences and scoring.general_sequences",
            reason=reasons.REASON_BAD_SPEC,
        )
    drawn = sorted(set(pool), key=lambda index: hash_fields(DRAW_TAG, seed, domain, salt, index))[:count]
    return drawn if in_order else sorted(drawn)


def draw_to_score(seed: bytes, domain: str, pool: Sequence[int], spec: run_pb2.RunSpec) -> list[int]:
    """Return the sequences of one domain that the seed draws for scoring: ascending, or with racing in evaluation order."""
    policy = spec.scoring
    count = policy.target_sequences if domain == spec.holdout.domain else policy.general_sequences
    return draw_sequences(seed, domain, pool, count, in_order=policy.minimum_sequences > 0)
