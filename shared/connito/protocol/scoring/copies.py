"""Finding copies: whose work is in an earlier commitment already. The earlier one is never blamed.

Three signs, each of them judged against earlier commitments alone, so that nothing committed later can make a copy of
somebody's work:

pair    Two pseudo-gradients point the same way: scaling does not hide a copy.
span    A pseudo-gradient is a linear combination of earlier ones: neither does mixing victims, in any proportion.
effect  It does to every held-out sequence what one or two earlier ones do, up to scale, and is far closer to them in
        this than any other miner. Random noise of twice the victim's length hides a direction in so many dimensions,
        but costs no utility; noise that is free leaves the losses, sequence by sequence, as they were, and those are
        in the validators' signed reports.

What honest work looks like under each of them, and where the limits come from: `bench/copies.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from connito.protocol.findings import Refusal
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts

Vector = NDArray[np.float64]
# (domain, number of the held-out sequence) -> by how many nats a submission lowers its loss.
Gains = Mapping[tuple[str, int], float]

# For so many cycles the work of others is remembered by its bytes; what is older is worth little, and a run may be long.
REMEMBERED_CYCLES = 16
# Fewer sequences than this say too little about likeness of effects.
MIN_SEQUENCES = 12
# Victims that are tried together, out of so many that share most with a submission's weights.
VICTIMS, CANDIDATES = 2, 4
# A copy is so much closer to its victim's effect than the next one is; how close that is depends on model and text.
CLOSER = 0.5
# Effects alone convict nobody: honest miners may learn the same. Weights have to share something too.
SHARED_FLOOR = 0.2
# A library's last digits must not decide.
_DIGITS = 9
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


def find_copies(
    submissions: Sequence[cycle_pb2.Submission], likeness: CopyEvidence, policy: run_pb2.ScorePolicy
) -> dict[str, str]:
    """Copy -> original, both miner keys; rows of `likeness` are in the order of `submissions`.

    A limit of the policy that is 0 leaves its sign out. A copy of a copy is traced to the first.
    """
    similarity = cosines(likeness.gram)
    original = copies(submissions, similarity, policy.copy_threshold)
    if policy.copy_span_threshold <= 0.0 and policy.copy_effect_threshold <= 0.0:
        return original
    firsts: list[int] = []
    for later in _in_commit_order(submissions):
        miner = submissions[later].miner
        if miner not in original and firsts:
            shared, parts = explained(similarity, firsts, later)
            victim = _by_span(shared, parts, policy) if parts.any() else None
            if victim is None and shared >= SHARED_FLOOR:
                victim = _by_effect(submissions, firsts, later, parts, likeness, policy.copy_effect_threshold)
            if victim is not None:
                original[miner] = submissions[firsts[victim]].miner
        if miner not in original:
            firsts.append(later)
    return {miner: _traced(miner, original) for miner in original}


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


def explained(similarity: NDArray[np.float64], earlier: Sequence[int], later: int) -> tuple[float, Vector]:
    """Return (R, parts [m]): how much of a pseudo-gradient's length lies in the span of earlier ones, and the
    coefficients.

    From cosines [n, n]: with C those of the earlier ones and b those with the later one, a = C⁺b and R = √(bᵀa), the
    multiple correlation coefficient. `parts` are a, that is in units of each one's own length.
    """
    rows = list(earlier)
    among, with_later = similarity[np.ix_(rows, rows)], similarity[rows, later]
    parts = np.linalg.pinv(among, rcond=1e-6, hermitian=True) @ with_later
    share = float(np.clip(with_later @ parts, 0.0, 1.0))
    return round(float(np.sqrt(share)), _DIGITS), np.round(parts, _DIGITS)


def distance(later: Gains, earlier: Sequence[Gains]) -> float:
    """Return how far the effect of a submission is from a combination of others': ‖g − Σ c_k g_k‖ / ‖g‖ with the best
    c ≥ 0.

    Over the sequences that all of them were measured on; infinite when those are too few, or a c is not positive.
    """
    common = sorted(set(later).intersection(*earlier))
    mine = np.array([later[key] for key in common])
    theirs = np.array([[gains[key] for key in common] for gains in earlier]).T
    length = float(np.linalg.norm(mine)) if len(common) >= MIN_SEQUENCES else 0.0
    if not 0.0 < length < float("inf") or not np.isfinite(theirs).all():
        return float("inf")
    best = np.linalg.lstsq(theirs, mine, rcond=1e-9)[0]
    if (best <= 0.0).any():
        return float("inf")
    return round(float(np.linalg.norm(mine - theirs @ best)) / length, _DIGITS)


def _by_span(shared: float, parts: Vector, policy: run_pb2.ScorePolicy) -> int | None:
    if policy.copy_span_threshold <= 0.0 or shared < policy.copy_span_threshold:
        return None
    return int(np.argmax(np.abs(parts)))


def _by_effect(
    submissions: Sequence[cycle_pb2.Submission],
    firsts: Sequence[int],
    later: int,
    parts: Vector,
    likeness: CopyEvidence,
    limit: float,
) -> int | None:
    """Return the victim, as a place in `firsts`, whose effect a submission has, by itself or with another one's."""
    if limit <= 0.0:
        return None
    near = [int(place) for place in np.argsort(-parts, kind="stable")[:CANDIDATES] if parts[place] > 0.0]
    for victims in _groups(near):
        miners = [submissions[firsts[place]].miner for place in victims]
        others = [submissions[first].miner for place, first in enumerate(firsts) if place not in victims]
        # Each further victim fits by chance what one does not.
        if _agreed(submissions[later].miner, miners, others, likeness, limit / len(victims)):
            return victims[0]
    return None


def _groups(candidates: Sequence[int]) -> Iterator[tuple[int, ...]]:
    for count in range(1, VICTIMS + 1):
        yield from itertools.combinations(candidates, count)


def _agreed(later: str, miners: Sequence[str], others: Sequence[str], likeness: CopyEvidence, limit: float) -> bool:
    """Return whether most of the stake that measured the later one finds the effects alike. Where submissions are assigned, one
    liar may be all that measured both of two."""
    alike = asked = 0.0
    for validator, gains in likeness.gains.items():
        if later in gains:
            weight, measured = likeness.stakes.get(validator, 1.0), all(miner in gains for miner in miners)
            asked += weight
            alike += weight if measured and _alike_in_effect(gains, later, miners, others, limit) else 0.0
    return alike > asked / 2


def _alike_in_effect(
    gains: Mapping[str, Gains], later: str, miners: Sequence[str], others: Sequence[str], limit: float
) -> bool:
    """Return whether effects are alike: below the limit and closer than other miners'; without others, half the limit."""
    victims = [gains[miner] for miner in miners]
    value = distance(gains[later], victims)
    if value > limit:
        return False
    apart = [distance(gains[other], victims) for other in others if other in gains]
    return value <= CLOSER * min((each for each in apart if each < float("inf")), default=limit)


def _in_commit_order(submissions: Sequence[cycle_pb2.Submission]) -> list[int]:
    return sorted(range(len(submissions)), key=lambda i: (submissions[i].commit_sequence, submissions[i].miner))


def _traced(miner: str, original: Mapping[str, str]) -> str:
    first = original[miner]
    while first in original:
        first = original[first]
    return first
