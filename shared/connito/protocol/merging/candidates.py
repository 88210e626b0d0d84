"""The candidates for the next model version, in the order the gate tries them, and how each is built.

1. The policy's aggregator over every submission that scored; and, where the run judges by expert, over these and the ones that
   gained nothing by themselves. Of the two the gate takes the one with the lower loss: work on one domain may harm the others
   alone, and belong to the merge all the same, which has the others' work on theirs.
2. The first without outliers: deltas longer than twice the median norm, or pointing against the others (their median
   cosine with the rest is negative).
3. The best submission alone, stepped to directly as the validators measured it: θ_{t+1} = θ_t − δ_best, of which each
   expert counts as it was judged where the run merges so (`connito.protocol.merging.by_expert`). The outer momentum restarts
   with it, as a rejected accelerated step calls for (O'Donoghue and Candès, "Adaptive restart for accelerated gradient schemes",
   2015).

If none passes, the incumbent stays and its momentum with it: a rejected candidate leaves no trace. Whoever audits a run
builds the same candidates from the log and the store, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connito.data.pseudo_gradients import DeltaFiles, DeltaSubset, expert_grams
from connito.data.tensors import TensorWriter, read_header
from connito.protocol.coding import step_codec
from connito.protocol.merging.aggregators import (
    Gram,
    OuterStep,
    Plan,
    Stepped,
    needs_grams,
    plan,
    plan_by_expert,
    write_step,
)
from connito.protocol.merging.by_expert import Routed, Use, alone, of_equal_mass
from connito.protocol.policy.choices import CAPPED
from connito.v1 import cycle_pb2, run_pb2

# A delta this many times longer than the median one is an outlier.
NORM_FACTOR = 2.0


@dataclass(frozen=True)
class MergeInputs:
    """Inputs of a merge. Submissions are in the order of their miners' keys; `gram` [n, n] are inner products.

    `staleness` counts cycles between the work and the merge. `momentum` is None before the first version. `routed` are the tokens
    [n, S] by layer that submissions claim; empty where the run merges whole submissions, or nobody claims any. `use` is that of
    the target's probe, and `strengths` [n, S] say how much of each submission was judged. `gainless` are those that were judged
    and gained nothing.
    """

    parent: Path
    momentum: Path | None
    submissions: Sequence[cycle_pb2.Submission]
    deltas: DeltaFiles
    utilities: Sequence[float]
    staleness: Sequence[int]
    gram: Gram
    routed: Routed = field(default_factory=dict)
    strengths: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    use: Use = field(default_factory=dict)
    gainless: frozenset[int] = frozenset()

    @property
    def scored(self) -> tuple[int, ...]:
        """Return the submissions with a utility."""
        return tuple(index for index in range(len(self.submissions)) if index not in self.gainless)

    @property
    def best(self) -> int:
        """Return the submission with the highest utility; of equal ones the one committed first."""
        return min(
            self.scored,
            key=lambda i: (-self.utilities[i], self.submissions[i].commit_sequence, self.submissions[i].miner),
        )

    def only(self, members: Sequence[int]) -> MergeInputs:
        """Return the inputs of some submissions, by their places."""
        rows = list(members)
        return MergeInputs(
            self.parent,
            self.momentum,
            [self.submissions[i] for i in rows],
            DeltaFiles([self.deltas.states[i] for i in rows], [self.deltas.bases[i] for i in rows]),
            [self.utilities[i] for i in rows],
            [self.staleness[i] for i in rows],
            self.gram[np.ix_(rows, rows)],
            {layer: counts[rows] for layer, counts in self.routed.items()},
            {layer: strength[rows] for layer, strength in self.strengths.items()},
            self.use,
            frozenset(place for place, i in enumerate(rows) if self.utilities[i] == 0),
        )


@dataclass(frozen=True)
class Candidate:
    """A candidate's share of the merge by miner (those above zero), and SHA-256 and bytes of its files."""

    weights: dict[str, float]
    files: Stepped


@dataclass(frozen=True)
class Attempt:
    """One candidate: what publishing it would be called, and which submissions (indices) go into it."""

    decision: cycle_pb2.GateDecision.ValueType
    members: tuple[int, ...]


def outliers(gram: Gram) -> list[int]:
    """Return indices of outlying deltas, from their inner products [n, n]."""
    norms: NDArray[np.float64] = np.sqrt(np.diag(gram))
    scale = np.where(norms > 0, norms, 1.0)
    cosines = gram / np.outer(scale, scale)
    found = []
    for i in range(len(norms)):
        rest = [float(cosines[i, j]) for j in range(len(norms)) if j != i]
        if norms[i] > NORM_FACTOR * float(np.median(norms)) or (rest and float(np.median(rest)) < 0):
            found.append(i)
    return found


def attempts(ingredients: MergeInputs) -> Iterator[Attempt]:
    """Yield the candidates in order; nothing without submissions."""
    scored = ingredients.scored
    if scored:
        yield Attempt(cycle_pb2.GATE_DECISION_ACCEPTED, scored)
    if ingredients.gainless:
        yield Attempt(cycle_pb2.GATE_DECISION_WITH_GAINLESS, tuple(range(len(ingredients.submissions))))
    if not scored:
        return
    odd = {scored[place] for place in outliers(ingredients.gram[np.ix_(scored, scored)])}
    calm = tuple(index for index in scored if index not in odd)
    if calm and odd:
        yield Attempt(cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS, calm)
    yield Attempt(cycle_pb2.GATE_DECISION_TOP_1, (ingredients.best,))


def plan_of(attempt: Attempt, ingredients: MergeInputs, policy: run_pb2.MergePolicy) -> Plan:
    """Return weights and factors of an attempt's members. Raises `Invalid` for an aggregator that does not exist."""
    members = list(attempt.members)
    direct = attempt.decision == cycle_pb2.GATE_DECISION_TOP_1
    if direct and ingredients.strengths:
        rows = {layer: strength[members[0]] for layer, strength in ingredients.strengths.items()}
        return Plan("top-1", (1.0,), (1.0,), alone(rows))
    wide = attempt.decision == cycle_pb2.GATE_DECISION_WITH_GAINLESS
    # Of aggregators that count utilities there is no such attempt; to others a utility says only who takes part.
    utilities = [1.0 if wide else ingredients.utilities[index] for index in members]
    staleness = [ingredients.staleness[index] for index in members]
    routed = {} if direct else {layer: counts[members] for layer, counts in ingredients.routed.items()}
    if policy.weighting == CAPPED:
        routed = of_equal_mass(routed)
    if not any(counts.any() for counts in routed.values()):
        gram = ingredients.gram[np.ix_(members, members)]
        return plan("top-1" if direct else policy.aggregator, utilities, staleness, gram)
    deltas = DeltaSubset(ingredients.deltas, members)
    grams = expert_grams(deltas) if needs_grams(policy.aggregator) else None
    return plan_by_expert(policy.aggregator, utilities, staleness, routed, grams, ingredients.use)


def write_candidate(
    attempt: Attempt,
    ingredients: MergeInputs,
    policy: run_pb2.MergePolicy,
    out_state: Path,
    out_momentum: Path,
    out_step: Path | None = None,
) -> Candidate:
    """Write the candidate's state and outer momentum; and its coded step, whose decoded state it is then.

    Memory: one tensor of each member. Raises `Invalid` (NON_FINITE) when the step overflows.
    """
    how = plan_of(attempt, ingredients, policy)
    deltas = DeltaSubset(ingredients.deltas, attempt.members)
    if attempt.decision == cycle_pb2.GATE_DECISION_TOP_1:
        step = OuterStep(ingredients.parent, None, 1.0, 0.0)
    else:
        rate, mu = policy.outer_learning_rate, policy.outer_momentum
        step = OuterStep(ingredients.parent, ingredients.momentum, rate, mu)
    coder = step_codec(policy)
    coded = None if coder is None or out_step is None else (coder, out_step)
    files = write_step(how, deltas, step, out_state, out_momentum, coded)
    miners = [ingredients.submissions[index].miner for index in attempt.members]
    weights = {miner: weight for miner, weight in zip(miners, how.weights, strict=True) if weight > 0.0}
    return Candidate(weights, files)


def write_resting_momentum(parent: Path, out: Path) -> None:
    """Write the outer momentum of an unmoved version: zeros over the parent's rows, float32."""
    layout = {name: ("F32", entry.shape) for name, entry in read_header(parent).entries.items()}
    with TensorWriter(out, layout) as writer:
        for name in writer.names:
            writer.write(name, np.zeros(layout[name][1], np.float32))
