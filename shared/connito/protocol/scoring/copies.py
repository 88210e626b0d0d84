"""Finding copies: whose work is in an earlier commitment already. The earlier one is never blamed.

Copies in the same bytes or, in a space of pseudo-gradients, in the same direction: scaling does not hide one. What leans on the
work of others without being it is `own_work`'s to find.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from connito.protocol.findings import Refusal
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts

# (domain, number of the held-out sequence) -> by how many nats a submission lowers its loss.
Gains = Mapping[tuple[str, int], float]

# For so many cycles the work of others is remembered by its bytes; what is older is worth little, and a run may be long.
REMEMBERED_CYCLES = 16
# Fewer sequences than this say too little about likeness of effects.
MIN_SEQUENCES = 12
_COSINE_DIGITS = 6


@dataclass(frozen=True)
class CopyEvidence:
    """Data by which submissions are compared: inner products of their pseudo-gradients [n, n], and what validators measured.

    `gains` by validator and miner. `stakes` by validator: the effect has to be alike for those with more than half of
    the stake that measured the later one, so a lying minority cannot frame anybody.
    """

    gram: NDArray[np.float64]
    gains: Mapping[str, Mapping[str, Gains]] = field(default_factory=dict)
    stakes: Mapping[str, float] = field(default_factory=dict)


def cosines(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return cosine similarities [n, n] from inner products. A zero pseudo-gradient is similar to nothing."""
    norms = np.sqrt(np.diag(gram))
    scale = np.outer(norms, norms)
    return np.asarray(np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0))


def gains_of(reports: Mapping[str, cycle_pb2.ScoreReport]) -> dict[str, dict[str, Gains]]:
    """Return effects by validator and miner, from the reports that count. A score without losses has none."""
    return {
        validator: {
            score.miner: {(loss.domain, loss.sequence): loss.before - loss.after for loss in score.losses}
            for score in report.scores
            if score.losses
        }
        for validator, report in reports.items()
    }


def refusals(
    submissions: Sequence[cycle_pb2.Submission], gram: NDArray[np.float64], original: Mapping[str, str]
) -> dict[str, Refusal]:
    """Return the refusal of each copy, with the miner that it copied and how like the two pseudo-gradients are."""
    row = {entry.miner: index for index, entry in enumerate(submissions)}
    similarity = cosines(gram)
    found = {}
    for miner, first in original.items():
        cosine = round(float(similarity[row[miner], row[first]]), _COSINE_DIGITS)
        finding = Finding(kind=cycle_pb2.FINDING_KIND_COPY, copy_of=first, cosine=cosine)
        found[miner] = Refusal(reasons_pb2.REASON_COPY, finding)
    return found


def handed_in_before(facts: RunFacts, cycle: int, submissions: Iterable[cycle_pb2.Submission]) -> dict[str, Refusal]:
    """Return the refusal of each of a cycle's submissions whose very bytes an earlier cycle had, from whomever.

    Where submissions are coded, they stand for another state on the θ_t of now, which may well gain something, and cost
    nothing: they lie in the store.
    """
    first: dict[str, str] = {}
    for earlier in range(max(1, cycle - REMEMBERED_CYCLES), cycle):
        for entry in facts.window("submit", earlier).submissions:
            first.setdefault(_content(entry), entry.miner)
    return {
        entry.miner: Refusal(
            reasons_pb2.REASON_COPY,
            Finding(kind=cycle_pb2.FINDING_KIND_COPY, copy_of=first[_content(entry)], cosine=1.0),
        )
        for entry in submissions
        if _content(entry) in first
    }


def _content(entry: cycle_pb2.Submission) -> str:
    """Return what the bytes of a submission hash to in clear: under another key the same work is another upload."""
    return entry.artifact.content or entry.artifact.digest


def copies(
    submissions: Sequence[cycle_pb2.Submission], similarity: NDArray[np.float64], threshold: float
) -> dict[str, str]:
    """Return copies by pairs alone; `similarity` [n, n] is in the order of `submissions`.

    Of two submissions whose similarity reaches the threshold, or whose artifacts are the same, the one committed later
    is the copy, never both. A copy of a copy is traced to the first. A threshold of 0 means exact copies only.
    """
    order = np.array(_in_commit_order(submissions), np.int64)
    original: dict[str, str] = {}
    files: dict[str, int] = {}
    for place, later in enumerate(order.tolist()):
        miner, digest = submissions[later].miner, submissions[later].artifact.digest
        earliest = files.setdefault(digest, place) if digest else place
        if threshold > 0.0:
            alike = np.flatnonzero(similarity[order[:earliest], later] >= threshold)
            earliest = int(alike[0]) if len(alike) else earliest
        if earliest < place:
            first = submissions[int(order[earliest])].miner
            original[miner] = original.get(first, first)
    return original


def _in_commit_order(submissions: Sequence[cycle_pb2.Submission]) -> list[int]:
    return sorted(range(len(submissions)), key=lambda i: (submissions[i].commit_sequence, submissions[i].miner))
