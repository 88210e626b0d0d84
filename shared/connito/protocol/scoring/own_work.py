"""Judging whose work a submission is: copies are refused, what leans on others is paid in part.

Each submission is judged against those committed before it that are no copies themselves, in three spaces: the
pseudo-gradients' weights, the change of the experts' functions (`functions`), and, with noise that costs nothing in
mind, what it does to each held-out sequence according to the validators. `novelty` has the two signs, and why they do
not accuse miners that read the same text. Limits and what they let through: `bench/attacks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from connito.protocol.findings import Refusal
from connito.protocol.scoring.copies import MIN_SEQUENCES, CopyEvidence, copies, cosines
from connito.protocol.scoring.novelty import Novelty, novelty
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.cycle_pb2 import Finding

# Earlier works that one is compared with: those most like it. Keeps a cycle of a thousand miners linear in them.
NEAREST = 32
# The same of effects: there are as many numbers as held-out sequences, some dozens.
NEAREST_EFFECTS = 8
# Each copy that is found makes what is usual clearer.
SWEEPS = 4
# The function of another, to three digits of its change.
SAME_FUNCTION = 0.9995
# Of an earlier cycle, the same step under some noise. What is less alike may have been trained from the text that a miner is
# given next, which everybody knows, to have its owner called a copier.
SAME_STEP = 0.95
# A copy's ratios are below these; from the larger ones on, work is its own altogether.
SPAN_LIMIT, SPAN_OWN = 0.18, 0.5
WEIGHT_LEAN_LIMIT, FUNCTION_LEAN_LIMIT, LEAN_OWN = 0.15, 0.1, 0.6
# Where fewer are before it, or all learn nearly the same, `own` of honest work falls as low as a thief's. From its limit on,
# which depends on their number, work is paid a part, and in full when it is so much above.
FOR_OWN, LEAST_USUAL, OWN_PAID = 3, 0.085, 0.2
# Two earlier works say little of what is usual.
FEW, FEW_SPAN_LIMIT = 2, 0.08
# A few vectors of so few numbers explain any other by chance.
NUMBERS_EACH = 64
# Few sequences tell less of an effect than many numbers of a weight: by how many earlier works there are, at least.
EFFECT_LIMITS = ((5, 0.06), (3, 0.04))
# Effects alone convict nobody: honest miners may learn the same. Functions have to share something too.
SHARED_FLOOR = 0.2
_SHARE_DIGITS, _COSINE_DIGITS = 3, 6

# Miner -> whose earlier work it leans on, and the part of its reward that is paid.
Leaning: TypeAlias = Mapping[str, Finding]


@dataclass(frozen=True)
class OwnWork:
    """Copy -> original, both miner keys, and those that are paid a part because they lean on earlier work."""

    original: dict[str, str] = field(default_factory=dict)
    leaning: dict[str, Finding] = field(default_factory=dict)


@dataclass(frozen=True)
class _Spaces:
    """Cosines of all submissions [n, n] in weights and in function."""

    weights: NDArray[np.float64]
    function: NDArray[np.float64]

    def signs(self, earlier: Sequence[int], later: int) -> list[tuple[float, float, int]]:
        """Return (ratio, share of own work, victim as a place in `earlier`) of every sign that is below its limits."""
        found = []
        for space, limit in ((self.weights, WEIGHT_LEAN_LIMIT), (self.function, FUNCTION_LEAN_LIMIT)):
            near = _nearest(space, earlier, later)
            told: Novelty = novelty(space, [earlier[place] for place in near], later)
            span = (FEW_SPAN_LIMIT, FEW_SPAN_LIMIT) if len(near) <= FEW else (SPAN_LIMIT, SPAN_OWN)
            for ratio, (low, high) in ((told.span, span), (told.lean, (limit, LEAN_OWN))):
                own = 0.0 if ratio <= low else 1.0 if ratio >= high else (ratio - low) / (high - low)
                found.append((ratio, own, near[told.victim]))
        return found

    def again(self, earlier: Sequence[int], others: Sequence[int], later: int) -> int | None:
        """Return the earlier work that this is, or that most of it is where it is a mix; None for new work. On `others` it may
        not lean either.
        """
        for space, lean in ((self.weights, WEIGHT_LEAN_LIMIT), (self.function, FUNCTION_LEAN_LIMIT)):
            same = [place for place in earlier if space[later, place] >= SAME_FUNCTION]
            if same:
                return same[0]
            for works, by_span in ((earlier, True), (others, False)):
                if not works:
                    continue
                near = _nearest(space, works, later)
                told = novelty(space, [works[place] for place in near], later)
                victim = works[near[told.victim]]
                limit = FEW_SPAN_LIMIT if len(near) <= FEW else SPAN_LIMIT
                if told.span <= limit if by_span else told.lean <= lean and space[later, victim] >= SAME_STEP:
                    return victim
        return None

    def part(self, earlier: Sequence[int], later: int) -> tuple[float, int]:
        """Return the part of a work that is paid for its own steps, 0 for none, and on whom it leans, as a place in `earlier`."""
        near = _nearest(self.function, earlier, later)
        told = novelty(self.function, [earlier[place] for place in near], later)
        if len(near) < FOR_OWN or told.own == float("inf"):
            return 1.0, 0
        if novelty(self.weights, [earlier[place] for place in near], later).usual < LEAST_USUAL:
            return 1.0, 0
        return min(1.0, max(0.0, (told.own - own_limit(len(near))) / OWN_PAID)), near[told.victim]


def own_limit(earlier: int) -> float:
    """Return the value of `own` up to which nothing is paid, by the number of earlier works: more of them tell more."""
    return -0.1 - 0.45 / earlier


def own_work(
    submissions: Sequence[cycle_pb2.Submission],
    evidence: CopyEvidence,
    function: NDArray[np.float64],
    policy: run_pb2.ScorePolicy,
    numbers: int,
) -> OwnWork:
    """Judge all of a cycle's submissions, each against earlier ones. A copy of a copy is traced to the first.

    `function` [n, n] are inner products of what the works changed, as `evidence.gram` has them of weights, of `numbers` each.
    A limit of the policy that is 0 leaves its sign out. Who commits second has hardly anybody before it to be held against:
    what later ones show is usual counts for it too, but nobody leans on what was committed later.
    """
    spaces = _Spaces(cosines(evidence.gram), cosines(function))
    found = OwnWork(copies(submissions, spaces.function, SAME_FUNCTION if policy.copy_threshold > 0.0 else 0.0))
    firsts: list[int] = []
    order = sorted(range(len(submissions)), key=lambda i: (submissions[i].commit_sequence, submissions[i].miner))
    for later in order:
        miner = submissions[later].miner
        if miner not in found.original and firsts and numbers >= NUMBERS_EACH * len(firsts[:NEAREST]):
            _judge(submissions, evidence, spaces, firsts, later, policy, found)
        # What moved nothing is like nothing, and no measure of anything.
        if miner not in found.original and min(spaces.weights[later, later], spaces.function[later, later]) > 0.0:
            firsts.append(later)
    if policy.copy_span_threshold > 0.0 and numbers >= NUMBERS_EACH * min(len(firsts), NEAREST):
        for _ in range(SWEEPS):
            convicted = {place for place in firsts if _leans(submissions, spaces, firsts, place, found)}
            firsts = [place for place in firsts if place not in convicted]
            if not convicted:
                break
    return found


def _leans(
    submissions: Sequence[cycle_pb2.Submission], spaces: _Spaces, firsts: Sequence[int], one: int, found: OwnWork
) -> bool:
    """Judge by *lean* one of the first works in the midst of all, later ones included; whether it is a copy."""
    earlier, others = firsts.index(one), [place for place in firsts if place != one]
    if not 0 < earlier < NEAREST:
        return False
    miner = submissions[one].miner
    for space, limit in ((spaces.weights, WEIGHT_LEAN_LIMIT), (spaces.function, FUNCTION_LEAN_LIMIT)):
        near = _nearest(space, others, one)
        before = sum(place < earlier for place in near)
        if before == 0:
            # All that are like it came later: nobody leans on those.
            continue
        told = novelty(space, [others[place] for place in near], one, before)
        if told.lean >= LEAN_OWN:
            continue
        first = submissions[others[near[told.victim]]].miner
        if told.lean <= limit:
            found.original[miner] = first
            return True
        share = round((told.lean - limit) / (LEAN_OWN - limit), _SHARE_DIGITS)
        if miner not in found.leaning or share < found.leaning[miner].share:
            found.leaning[miner] = Finding(kind=cycle_pb2.FINDING_KIND_LEANS, copy_of=first, share=share)
    return False


def handed_in_again(
    asked: Sequence[cycle_pb2.Submission],
    submissions: Sequence[cycle_pb2.Submission],
    earlier: Sequence[cycle_pb2.Submission],
    grams: tuple[NDArray[np.float64], NDArray[np.float64]],
    policy: run_pb2.ScorePolicy,
    numbers: int,
) -> dict[str, Refusal]:
    """Return the refusal of each work that is one of an earlier cycle, or a mix of such, in whatever bytes.

    `grams` of weights and of functions have rows for `earlier`, then for `submissions`. Nobody is held against what was
    committed later than its own work. A miner may read the same text in every cycle, and leans on its own earlier work then.
    """
    spaces = _Spaces(cosines(grams[0]), cosines(grams[1]))
    found = {}
    for entry in asked if policy.copy_span_threshold > 0.0 else ():
        row = len(earlier) + submissions.index(entry)
        before = [place for place, work in enumerate(earlier) if work.commit_sequence < entry.commit_sequence]
        others = [place for place in before if earlier[place].miner != entry.miner]
        if (
            numbers >= NUMBERS_EACH * len(before[:NEAREST])
            and (victim := spaces.again(before, others, row)) is not None
        ):
            cosine = round(float(spaces.function[row, victim]), _COSINE_DIGITS)
            kind, whose = cycle_pb2.FINDING_KIND_COPY, earlier[victim].miner
            found[entry.miner] = Refusal(reasons_pb2.REASON_COPY, Finding(kind=kind, copy_of=whose, cosine=cosine))
    return found


def withhold(verdict: cycle_pb2.Verdict, leaning: Finding | None) -> None:
    """Pay a miner its own part of the work: changes the verdict in place, and says so where nothing else is said."""
    if leaning is None or verdict.status == cycle_pb2.VERDICT_STATUS_REJECTED:
        return
    full = verdict.reward
    verdict.reward = round(full * Fraction(leaning.share))
    verdict.withheld += full - verdict.reward
    verdict.leaning.CopyFrom(leaning)
    if verdict.reason == reasons_pb2.REASON_UNSPECIFIED and not verdict.finding.kind:
        verdict.finding.CopyFrom(leaning)


def leaning_of(scored: cycle_pb2.CycleScored) -> Leaning:
    """Return what a published result says of leaning."""
    return {verdict.miner: verdict.leaning for verdict in scored.verdicts if verdict.HasField("leaning")}


def _judge(
    submissions: Sequence[cycle_pb2.Submission],
    evidence: CopyEvidence,
    spaces: _Spaces,
    firsts: Sequence[int],
    later: int,
    policy: run_pb2.ScorePolicy,
    found: OwnWork,
) -> None:
    miner = submissions[later].miner
    signs = spaces.signs(firsts, later) if policy.copy_span_threshold > 0.0 else []
    _, own, victim = min(signs, key=lambda sign: (sign[1], sign[0]), default=(0.0, 1.0, 0))
    if own > 0.0 and policy.copy_effect_threshold > 0.0:
        nearest = int(np.argmax(spaces.function[later, list(firsts)]))
        if spaces.function[later, firsts[nearest]] >= SHARED_FLOOR:
            near = _nearest(spaces.function, firsts, later, NEAREST_EFFECTS)
            names = [submissions[firsts[place]].miner for place in near]
            if _same_effect(miner, names, evidence):
                own, victim = 0.0, nearest
    if own == 0.0:
        found.original[miner] = submissions[firsts[victim]].miner
        return
    if policy.copy_span_threshold > 0.0:
        part, leant_on = spaces.part(firsts, later)
        own, victim = min((own, victim), (part, leant_on))
    if own < 1.0:
        first = submissions[firsts[victim]].miner
        share = round(own, _SHARE_DIGITS)
        found.leaning[miner] = Finding(kind=cycle_pb2.FINDING_KIND_LEANS, copy_of=first, share=share)


def _same_effect(miner: str, firsts: Sequence[str], evidence: CopyEvidence) -> bool:
    """Return whether most of the stake that measured them finds the effect of a submission in those of earlier ones."""
    alike = asked = 0.0
    for validator, gains in evidence.gains.items():
        ratio, limit = (
            _effect(gains, miner, [name for name in firsts if name in gains]) if miner in gains else (None, 0.0)
        )
        if ratio is not None:
            weight = evidence.stakes.get(validator, 1.0)
            asked += weight
            alike += weight if ratio <= limit else 0.0
    return alike > asked / 2


def _effect(
    gains: Mapping[str, Mapping[tuple[str, int], float]], miner: str, firsts: Sequence[str]
) -> tuple[float | None, float]:
    """Return the ratio of `novelty` over held-out sequences and its limit; None where too little was measured."""
    common = sorted(set(gains[miner]).intersection(*(gains[name] for name in firsts)))
    rows = np.array([[gains[name][key] for key in common] for name in (*firsts, miner)])
    limit = next((limit for count, limit in EFFECT_LIMITS if len(firsts) >= count), 0.0)
    if not limit or len(common) < len(firsts) + MIN_SEQUENCES or not np.isfinite(rows).all():
        return None, limit
    similarity = cosines(rows @ rows.T)
    return novelty(similarity, range(len(firsts)), len(firsts)).span, limit


def _nearest(space: NDArray[np.float64], earlier: Sequence[int], later: int, count: int = NEAREST) -> list[int]:
    """Return places in `earlier`, in their order, of the works most like a later one."""
    likeness = np.abs(space[later, list(earlier)])
    return sorted(int(place) for place in np.argsort(-likeness, kind="stable")[:count])
