"""One cycle's scoring and merge over files, from consensus to a gated version. Blocking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from connito.data.codecs.file import CODED
from connito.data.pseudo_gradients import DeltaFiles
from connito.data.safetensors_header import SAFETENSORS
from connito.data.tensors import read_header
from connito.errors import Invalid
from connito.protocol.claims import claim_of, counts_of
from connito.protocol.coding import is_coded
from connito.protocol.findings import Refusal, Refusals, finding_of
from connito.protocol.merging.aggregators import COUNT_UTILITIES
from connito.protocol.merging.by_expert import judged, use_of
from connito.protocol.merging.candidates import (
    Attempt,
    Candidate,
    MergeInputs,
    attempts,
    write_candidate,
    write_resting_momentum,
)
from connito.protocol.merging.earlier import EarlierWork
from connito.protocol.merging.gate import Losses, Outcome, Part, Rule, choose
from connito.protocol.merging.opened import Files, in_order, opened
from connito.protocol.scoring import copies
from connito.protocol.scoring.consensus import Consensus
from connito.protocol.scoring.copies import CopyEvidence, gains_of
from connito.protocol.scoring.counted_reports import read_reports
from connito.protocol.scoring.functions import function_gram
from connito.protocol.scoring.own_work import Leaning, handed_in_again, own_work
from connito.protocol.scoring.verdicts import score_cycle, without
from connito.store.cache import digest_of_file
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts
from connito.wire.private import placed

_NO_GAIN = (cycle_pb2.FINDING_KIND_NO_GAIN, cycle_pb2.FINDING_KIND_UNCERTAIN_GAIN)
# (part of the hold-out, digest of a state, its file) -> losses
Measure = Callable[[Part, str, Path], Losses]


@dataclass(frozen=True)
class Merged:
    """The result of a cycle. `state`, `momentum` and `step` are files to publish; `state` is the parent's where nothing changed.
    There is no `step` then, nor where the run codes none."""

    scored: cycle_pb2.CycleScored
    version: cycle_pb2.VersionPublished
    state: Path
    momentum: Path
    step: Path | None = None


def merge_cycle(
    facts: RunFacts,
    cycle: int,
    submissions: Sequence[cycle_pb2.Submission],
    agreed: Consensus,
    unusable: Refusals,
    files: Files,
    losses: Measure | cycle_pb2.VersionPublished,
    folder: Path,
) -> Merged:
    """Score and merge a cycle; `unusable` are submissions that could not be fetched. New files go to `folder`.

    The same facts and files give the same bytes. With a published version in place of a measure, no model is needed: its
    losses and the gate's decision are taken, and a decision that these facts and files do not even offer comes out as
    another one.
    """
    files, faulty, weights = opened(facts, submissions, files, folder)
    refused = {**unusable, **faulty}
    agreed = without(agreed, refused)
    sound = in_order(entry for entry in submissions if entry.miner not in refused)
    before = len(files.earlier)
    ingredients = _ingredients(facts, sound, agreed, cycle, files, weights[before:, before:])
    copied, leaning = _whose(facts, cycle, agreed, ingredients, files.earlier, weights)
    own = [place for place, entry in enumerate(sound) if entry.miner not in copied]
    gainless = _gainless(facts, agreed, ingredients)
    useful = ingredients.only([place for place in own if ingredients.utilities[place] > 0 or place in gainless])
    merge = (
        _Recorded(facts, cycle, useful, losses, folder)
        if isinstance(losses, cycle_pb2.VersionPublished)
        else _Measured(facts, cycle, useful, losses, folder)
    )
    outcome = merge.run()
    unmerged = merge.unmerged(outcome)
    scored = score_cycle(facts, cycle, submissions, agreed, copied, merge.weights(outcome), unmerged, leaning)
    return merge.result(outcome, scored)


def _gainless(facts: RunFacts, agreed: Consensus, inputs: MergeInputs) -> frozenset[int]:
    """Return the submissions that were judged by expert and gained nothing, where they may be merged with others."""
    spec = facts.require_spec()
    if not inputs.use or spec.merging.aggregator in COUNT_UTILITIES:
        return frozenset()
    reasons = [agreed.reasons.get(entry.miner) for entry in inputs.submissions]
    return frozenset(
        place
        for place, reason in enumerate(reasons)
        if inputs.utilities[place] == 0 and reason is not None and reason.finding.kind in _NO_GAIN
    )


def _whose(
    facts: RunFacts,
    cycle: int,
    agreed: Consensus,
    inputs: MergeInputs,
    earlier: Sequence[EarlierWork],
    weights: NDArray[np.float64],
) -> tuple[Refusals, Leaning]:
    """Return the copies among submissions that are in order, and who is paid a part.

    `weights` are inner products of `earlier`, then of the submissions.
    """
    spec, sound = facts.require_spec(), inputs.submissions
    measured = gains_of(read_reports(facts, cycle).counted)
    evidence = CopyEvidence(inputs.gram, measured, agreed.stakes)
    drawn = facts.drawn(cycle)
    states = [*(work.state for work in earlier), *inputs.deltas.states]
    bases = [*(work.base for work in earlier), *inputs.deltas.bases]
    functions = function_gram(states, bases, b"" if drawn is None else drawn.seed)
    # Experts of a form that is not known are compared by their weights alone.
    functions = functions if functions.any() else weights
    function = functions[len(earlier) :, len(earlier) :]
    found = own_work(sound, evidence, function, spec.scoring, inputs.deltas.numbers)
    # Whoever moved nothing is told that; such bytes are the same in every cycle.
    moving = [entry for place, entry in enumerate(sound) if inputs.gram[place, place] > 0]
    same = copies.handed_in_before(facts, cycle, moving) if is_coded(spec.training) else {}
    before = [work.entry for work in earlier]
    again = handed_in_again(moving, sound, before, (weights, functions), spec.scoring, inputs.deltas.numbers)
    return {**copies.refusals(sound, function, found.original), **again, **same}, found.leaning


def _ingredients(
    facts: RunFacts,
    sound: Sequence[cycle_pb2.Submission],
    agreed: Consensus,
    cycle: int,
    files: Files,
    gram: NDArray[np.float64],
) -> MergeInputs:
    selection, paths = facts.require_selection(), [files.states[entry.miner] for entry in sound]
    deltas = DeltaFiles(paths, [files.bases[entry.miner] for entry in sound])
    claims = [claim_of(read_header(path), facts.require_spec(), selection) for path in paths]
    return MergeInputs(
        files.parent,
        files.momentum,
        sound,
        deltas,
        [agreed.utilities.get(entry.miner, 0.0) for entry in sound],
        [max(0, cycle - (entry.origin_cycle or cycle)) for entry in sound],
        gram,
        counts_of(claims),
        judged(claims, use_of(selection)),
        use_of(selection),
    )


class _Merge(ABC):
    """Candidates of one cycle, built on demand, and the version that the accepted one becomes."""

    def __init__(self, facts: RunFacts, cycle: int, ingredients: MergeInputs, folder: Path) -> None:
        opened = facts.window("train", cycle).require_opened()
        self.facts, self.cycle, self.spec, self.opened = facts, cycle, facts.require_spec(), opened
        self.ingredients, self.folder = ingredients, folder
        self._built: dict[Attempt, Candidate] = {}

    def _paths(self, attempt: Attempt) -> tuple[Path, Path]:
        stem = f"{self.cycle}-{attempt.decision}"
        return self.folder / f"{stem}-state.safetensors", self.folder / f"{stem}-momentum.safetensors"

    @abstractmethod
    def run(self) -> Outcome:
        """Return the candidate that stands."""

    @abstractmethod
    def _gate_losses(self, outcome: Outcome) -> list[cycle_pb2.DomainLoss]: ...

    @abstractmethod
    def _report_losses(self, digest: str, state: Path) -> list[cycle_pb2.DomainLoss]: ...

    def weights(self, outcome: Outcome) -> dict[str, float]:
        """Return shares of the merge that stands."""
        built = self._built.get(outcome.attempt)
        return {} if built is None else built.weights

    def _build(self, attempt: Attempt) -> tuple[str, Path]:
        """Write an attempt's files; return digest and path of its state."""
        state, momentum = self._paths(attempt)
        built = write_candidate(
            attempt, self.ingredients, self.spec.merging, state, momentum, state.with_suffix(".step")
        )
        self._built[attempt] = built
        return built.files.state[0], state

    def unmerged(self, outcome: Outcome) -> Refusals:
        """Return why each submission that scored has no share in the merge."""
        decision, merging = outcome.attempt.decision, self.spec.merging
        found: dict[str, Refusal] = {}
        for index, entry in enumerate(self.ingredients.submissions):
            if decision == cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS and index not in outcome.attempt.members:
                finding = Finding(kind=cycle_pb2.FINDING_KIND_OUTLIER)
                found[entry.miner] = Refusal(reasons_pb2.REASON_OUTLIER, finding)
            elif decision == cycle_pb2.GATE_DECISION_ACCEPTED:
                finding = Finding(kind=cycle_pb2.FINDING_KIND_NOT_WEIGHTED, name=merging.aggregator)
                found[entry.miner] = Refusal(reasons_pb2.REASON_UNSPECIFIED, finding)
            else:
                found[entry.miner] = Refusal(reasons_pb2.REASON_GATE_REJECTED, outcome.refused)
        return found

    def result(self, outcome: Outcome, scored: cycle_pb2.CycleScored) -> Merged:
        """Return the messages and the files that go with them."""
        weights = self.weights(outcome)
        built = self._built.get(outcome.attempt)
        state, momentum = self._paths(outcome.attempt) if weights else self._unmoved()
        ref, outer = (
            (self._ref(*built.files.state), self._ref(*built.files.momentum))
            if built is not None and weights
            else (self._ref(*digest_of_file(state)), self._ref(*digest_of_file(momentum)))
        )
        version = cycle_pb2.VersionPublished(
            run=self.facts.run,
            cycle=self.cycle,
            version=self.opened.version + 1,
            parent=self.opened.version,
            state=ref,
            outer_state=outer,
            gate=outcome.attempt.decision,
            finding=outcome.refused if outcome.refused.kind else None,
            gate_losses=self._gate_losses(outcome),
            losses=self._report_losses(ref.digest, state),
            merged=list(weights),
            weights=list(weights.values()),
        )
        step = state.with_suffix(".step")
        if not (weights and step.exists()):
            return Merged(scored, version, state, momentum)
        version.step.CopyFrom(self._ref(*digest_of_file(step), CODED))
        return Merged(scored, version, state, momentum, step)

    def _ref(self, digest: str, size: int, media_type: str = SAFETENSORS) -> artifacts_pb2.ArtifactRef:
        ref = placed(self.spec)
        ref.MergeFrom(artifacts_pb2.ArtifactRef(digest=digest, size=size, media_type=media_type))
        return ref

    def _unmoved(self) -> tuple[Path, Path]:
        """Return the incumbent, with the momentum it came with."""
        momentum = self.ingredients.momentum
        if momentum is None:
            momentum = self.folder / "resting-momentum.safetensors"
            write_resting_momentum(self.ingredients.parent, momentum)
        return self.ingredients.parent, momentum


class _Measured(_Merge):
    """Candidates tried one after the other, each measured by the gate."""

    def __init__(self, facts: RunFacts, cycle: int, ingredients: MergeInputs, measure: Measure, folder: Path) -> None:
        super().__init__(facts, cycle, ingredients, folder)
        self.measure = measure

    def run(self) -> Outcome:
        """Try the candidates. Without any, nothing is measured."""
        tries = list(attempts(self.ingredients))
        incumbent = self._parent_losses("gate") if tries else Losses({})
        return choose(tries, incumbent, self._try, Rule.of(self.facts, self.cycle))

    def _parent_losses(self, part: Part) -> Losses:
        return self.measure(part, self.opened.state.digest, self.ingredients.parent)

    def _try(self, attempt: Attempt) -> Losses | Finding:
        try:
            digest, state = self._build(attempt)
        except Invalid as error:
            if error.reason != reasons_pb2.REASON_NON_FINITE:
                raise
            return Finding(kind=cycle_pb2.FINDING_KIND_GATE_OVERFLOW, name=error.about)
        return self.measure("gate", digest, state)

    def _gate_losses(self, outcome: Outcome) -> list[cycle_pb2.DomainLoss]:
        # By sequence where later cycles are held to them.
        by_sequence = self.spec.merging.gate_target_margin > 0.0
        return _compared(self._parent_losses("gate"), outcome.after, by_sequence) if outcome.after.sums else []

    def _report_losses(self, digest: str, state: Path) -> list[cycle_pb2.DomainLoss]:
        return _compared(self._parent_losses("report"), self.measure("report", digest, state), by_sequence=True)


class _Recorded(_Merge):
    """The candidate that a published version names, built without measuring anything."""

    def __init__(
        self,
        facts: RunFacts,
        cycle: int,
        ingredients: MergeInputs,
        published: cycle_pb2.VersionPublished,
        folder: Path,
    ) -> None:
        super().__init__(facts, cycle, ingredients, folder)
        self._published = published

    def run(self) -> Outcome:
        """Take the recorded decision."""
        tries, refused = list(attempts(self.ingredients)), finding_of(self._published)
        if not tries:
            return Outcome(Attempt(cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE, ()), Losses({}), Finding())
        for attempt in tries:
            if attempt.decision == self._published.gate:
                self._build(attempt)
                return Outcome(attempt, Losses({}), refused)
        return Outcome(Attempt(cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, ()), Losses({}), refused)

    def _gate_losses(self, outcome: Outcome) -> list[cycle_pb2.DomainLoss]:
        return list(self._published.gate_losses)

    def _report_losses(self, digest: str, state: Path) -> list[cycle_pb2.DomainLoss]:
        return list(self._published.losses)


def _compared(before: Losses, after: Losses, by_sequence: bool) -> list[cycle_pb2.DomainLoss]:
    old, new, found = before.per_token(), after.per_token(), []
    for domain in old:
        loss = cycle_pb2.DomainLoss(domain=domain, before=old[domain], after=new[domain], tokens=before.sums[domain][1])
        if by_sequence and domain in before.rows and domain in after.rows:
            loss.before_sums.extend(before.rows[domain][0])
            loss.after_sums.extend(after.rows[domain][0])
            loss.sequence_tokens.extend(before.rows[domain][1])
        found.append(loss)
    return found
