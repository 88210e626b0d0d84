"""Measuring again with the model: the selection of a run, and what every submission does to the drawn sequences.

Losses are floating-point sums. On the machine that measured them, with as many threads, they come out to the bit; on
another one within a tolerance, which is reported. Needs torch.
"""

from __future__ import annotations

import functools
import json
import math
import tempfile
import threading
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connito.audit.artifacts import Artifacts
from connito.audit.differences import Difference, Step, first_difference
from connito.audit.distances import Distances
from connito.audit.evidence import Evidence
from connito.audit.recompute import Recomputation
from connito.data.manifest import Manifest
from connito.data.safetensors_header import SAFETENSORS
from connito.errors import Invalid
from connito.library.start import Shelved, deposits, notice_of, notices, wants_start
from connito.protocol.claims import drawn_claims
from connito.protocol.findings import OF_THE_FILE, Refusal
from connito.protocol.merging.gate import Losses as GateLosses
from connito.protocol.merging.gate import Part
from connito.protocol.scoring.evaluation import Evaluation, rejected, score
from connito.protocol.scoring.racing import InterimLook, looks
from connito.protocol.sequences import replays
from connito.runtime.compute import set_threads
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views.sentences import sentence
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts
from connito.wire.locked import unlocked
from connito.wire.private import placed
from connito.workloads import gating, scoring
from connito.workloads.claims import Recount, Text
from connito.workloads.fetching import holdout_refs
from connito.workloads.scoring import SubmissionFiles
from connito.workloads.selecting import Library


class Models:
    """The full model of a run, as the validators and as the gate use it. Loaded when first asked for.

    Asking raises `Invalid` when an artifact is not there or does not fit.
    """

    def __init__(self, evidence: Evidence, artifacts: Artifacts, threads: int) -> None:
        self._evidence, self._artifacts = evidence, artifacts
        set_threads(threads)

    @functools.cached_property
    def scoring(self) -> scoring.SubmissionEvaluator:
        """Return the evaluator of submissions that validators use."""
        return scoring.SubmissionEvaluator.load(*_parts(self._evidence, self._artifacts), device="cpu")

    @functools.cached_property
    def gating(self) -> gating.GateEvaluator:
        """Return the evaluator that the aggregator's gate uses."""
        return gating.GateEvaluator.load(*_parts(self._evidence, self._artifacts))

    def recount(self, facts: RunFacts, cycle: int, miners: Container[str]) -> Recount:
        """Return what counts claims again."""
        return self.scoring.recount(self._text, facts, cycle, miners)

    @functools.cached_property
    def _text(self) -> Text:
        spec, artifacts = self._evidence.facts.require_spec(), self._artifacts
        replay = artifacts.path(spec.replay.artifact) if replays(spec) else None
        return Text(spec, artifacts.path(spec.train.artifact), replay)

    def measure(self, part: Part, digest: str, state: Path) -> GateLosses:
        """Return the gate's losses of a state."""
        return self.gating.measure(part, digest, state)


_Parts = tuple[run_pb2.RunSpec, run_pb2.SelectionMade, dict[str, Path], dict[str, Path]]


def _parts(evidence: Evidence, artifacts: Artifacts) -> _Parts:
    spec, selection = evidence.facts.require_spec(), evidence.facts.require_selection()
    files = _base(spec, artifacts)
    holdouts = {domain: artifacts.path(ref) for domain, ref in holdout_refs(spec).items()}
    return spec, selection, files, holdouts


def _base(spec: run_pb2.RunSpec, artifacts: Artifacts) -> dict[str, Path]:
    manifest = Manifest.load(artifacts.path(spec.base.manifest))
    return {name: artifacts.path(file.ref) for name, file in manifest.files.items()}


def selection(work: Recomputation) -> Step:
    """Check the selection: the probe through the base, the map, the report, and θ_0, byte for byte."""
    facts = work.evidence.facts
    spec, made = facts.spec, facts.selection
    if spec is None or made is None:
        return Step("selection", 0, 0, note="nothing was selected")
    work.say("selecting again")
    try:
        again = _select(spec, work.artifacts, made, _library(work, spec, made))
        what = first_difference(again, made) or _ruled_out(again.start, made.start)
    except Invalid as error:
        what = f"cannot be recomputed: {error}"
    found = (Difference("selection", "run.0.selected", what),) if what else ()
    return Step("selection", 0, sum(len(layer.experts) for layer in made.layers), found)


def _ruled_out(again: run_pb2.StartChoice, made: run_pb2.StartChoice) -> str:
    for one, other in zip(again.candidates, made.candidates, strict=True):
        if bool(one.refused) != bool(other.refused):
            return f"{one.expert_id} is {'' if one.refused else 'not '}ruled out as a start, the log says otherwise"
    return ""


def _library(work: Recomputation, spec: run_pb2.RunSpec, made: run_pb2.SelectionMade) -> Library | None:
    """Return the selector's candidates for a start: every deposit of the base up to the sequence that it names."""
    if not wants_start(spec):
        return None
    last, artifacts, library = made.start.library_sequence, work.artifacts, work.evidence.library
    shelf, against = [], notices(library, last)
    for deposit in deposits(library, spec, last):
        record = json.loads(artifacts.path(deposit.record).read_bytes())
        notice = notice_of(record, deposit.expert_id, against)
        shelf.append(Shelved(deposit, record, artifacts.path(deposit.expert), notice))
    return Library(shelf, last)


def _select(
    spec: run_pb2.RunSpec, artifacts: Artifacts, made: run_pb2.SelectionMade, library: Library | None
) -> run_pb2.SelectionMade:
    """Return the recomputed fact. A report whose figures for people are another machine's to the last digits is accepted."""
    from connito.store import ref_of_bytes, ref_of_file
    from connito.workloads.selecting import Probes, choose

    place = placed(spec)
    manifest = Manifest.load(artifacts.path(spec.base.manifest))
    replay = artifacts.path(spec.replay.artifact) if spec.HasField("replay") else None
    probes = Probes(
        artifacts.path(spec.probe.artifact),
        replay,
        {corpus.domain: artifacts.path(corpus.artifact) for corpus in spec.beside},
    )
    with tempfile.TemporaryDirectory(prefix="connito-audit-") as folder:
        theta = Path(folder) / "theta.safetensors"
        chosen = choose(spec, manifest, _base(spec, artifacts), probes, theta, library)
        statistics = ref_of_bytes(chosen.statistics, SAFETENSORS, place)
        report = chosen.report(statistics.digest)
        ref = ref_of_bytes(report, "application/json", place)
        if ref != made.report and _agrees(artifacts.path(made.report), report):
            ref = made.report
        return run_pb2.SelectionMade(
            run=spec.run,
            layers=[*map(_as_said, chosen.layers(), made.layers)],
            report=ref,
            signature=ref_of_bytes(chosen.signature_bytes(), "application/json", place),
            initial_state=ref_of_file(theta, SAFETENSORS, place),
            selected_experts=chosen.selection.selected,
            total_experts=chosen.selection.total,
            target_parameters=chosen.target_parameters,
            model_parameters=chosen.model_parameters,
            start=chosen.start,
            routers=chosen.selection.routers,
        )


def _as_said(again: run_pb2.LayerSelection, made: run_pb2.LayerSelection) -> run_pb2.LayerSelection:
    """Return a layer with the use of its experts as the log has it, where that is the same within rounding."""
    if _close(list(again.use), list(made.use)):
        again.use[:] = made.use
    return again


def _agrees(made: Path, again: bytes) -> bool:
    """Return whether a report with other bytes has the same content: exactly what later steps use, and within rounding
    what it tells people."""
    try:
        there, here = json.loads(made.read_bytes()), json.loads(again)
    except ValueError:
        return False
    decides = ("method", "threshold", "layers", "helpers", "base", "selected", "total")
    if any(there.get(name) != here.get(name) for name in decides):
        return False
    return _close(there | {"statistics": ""}, here | {"statistics": ""})


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-5)
    return bool(one == other)


def losses(work: Recomputation, models: Models, cycle: int, only: str = "") -> Step:
    """Check every report's losses on the sequences that the seed draws. `only`: of one miner."""
    facts = work.evidence.facts
    drawn = facts.drawn(cycle)
    opened = facts.window("train", cycle).opened
    if drawn is None or opened is None or facts.window("submit", cycle).settled is None:
        return Step("losses", cycle, 0, note="nothing was drawn")
    distances = Distances(work.tolerance)
    try:
        again = _measure(work, models, cycle, drawn.seed, opened, only)
        found = tuple(_compare(work, cycle, again, distances))
    except Invalid as error:
        where = work.evidence.subject("validate", cycle, "drawn")
        found = (Difference("losses", where, f"cannot be measured again: {error}", cycle),)
    return Step("losses", cycle, distances.compared, found, distances.note())


@dataclass(frozen=True)
class _Remeasured:
    """A submission as an honest validator scores it; `evaluation` is None where its file cannot be measured."""

    score: cycle_pb2.SubmissionScore
    evaluation: Evaluation | None

    def upto(self, look: InterimLook) -> list[cycle_pb2.SequenceLoss]:
        """Return the losses that come up to a look."""
        by_domain = {} if self.evaluation is None else self.evaluation.upto(look)
        return [loss for of_domain in by_domain.values() for loss in of_domain]


def _measure(
    work: Recomputation, models: Models, cycle: int, seed: bytes, opened: cycle_pb2.WindowOpened, only: str
) -> dict[str, _Remeasured]:
    """Return an honest validator's report, by miner."""
    facts, artifacts = work.evidence.facts, work.artifacts
    spec = facts.require_spec()
    drawn = models.scoring.draw(seed)
    state, stop = artifacts.path(opened.state), threading.Event()
    before = models.scoring.incumbent(state, drawn, stop)
    found = {}
    for entry in facts.window("submit", cycle).submissions:
        if (only and entry.miner != only) or entry.artifact.digest not in artifacts.paths:
            continue
        work.say(f"measuring {work.evidence.name(entry.miner)} of cycle {cycle} again")
        same_base = entry.base_state.digest in ("", opened.state.digest)
        path, origin = artifacts.path(entry.artifact), None if same_base else artifacts.path(entry.base_state)
        with tempfile.TemporaryDirectory(prefix="connito-unlock-") as folder:
            try:
                files = SubmissionFiles(unlocked(path, entry.artifact, Path(folder)), origin)
                measurable = models.scoring.submission(state, files, drawn, before, stop, entry.miner)
                evaluation = Evaluation(drawn, measurable, spec.holdout.domain)
                found[entry.miner] = _Remeasured(score(entry, evaluation, spec), evaluation)
            except Invalid as error:
                found[entry.miner] = _Remeasured(rejected(entry, Refusal.of(error)), None)
    return found


def claims(work: Recomputation, models: Models, cycle: int, only: str = "") -> Step:
    """Count all claims of routed tokens again: of drawn submissions the reports have to say what comes out, and false ones that
    nobody looked at are noted.
    """
    facts = work.evidence.facts
    opened, entries = facts.window("train", cycle).opened, facts.window("submit", cycle).submissions
    if opened is None or facts.drawn(cycle) is None:
        return Step("claims", cycle, 0, note="nothing was drawn")
    drawn = drawn_claims(facts, cycle, (entry.miner for entry in entries))
    entries = [e for e in entries if e.artifact.digest in work.artifacts.paths and only in ("", e.miner)]
    recount = models.recount(facts, cycle, {entry.miner for entry in entries})
    found: list[Difference] = []
    unseen: list[str] = []
    for entry in entries:
        work.say(f"counting the claim of {work.evidence.name(entry.miner)} of cycle {cycle} again")
        start = work.artifacts.path(entry.base_state if entry.base_state.digest else opened.state)
        with tempfile.TemporaryDirectory(prefix="connito-unlock-") as folder:
            clear = unlocked(work.artifacts.path(entry.artifact), entry.artifact, Path(folder))
            lie = recount.falsehood(entry, clear, start)
        if entry.miner in drawn:
            found += _claim_faults(work, cycle, entry, lie)
        elif lie is not None:
            unseen.append(f"{work.evidence.name(entry.miner)}: {sentence(lie.finding)}")
    note = f"false, and not drawn: {'; '.join(unseen)}" if unseen else ""
    return Step("claims", cycle, len(entries), tuple(found), note)


def _claim_faults(
    work: Recomputation, cycle: int, entry: cycle_pb2.Submission, lie: Refusal | None
) -> Iterator[Difference]:
    """Yield the reports that call a true claim false, or let a false one pass."""
    for validator, fact in work.evidence.facts.reports(cycle).items():
        score_of = next((score for score in fact.message.scores if score.miner == entry.miner), None)
        if score_of is None or (score_of.reason in OF_THE_FILE and score_of.reason != reasons_pb2.REASON_FALSE_CLAIM):
            continue
        said = score_of.reason == reasons_pb2.REASON_FALSE_CLAIM
        if said != (lie is not None):
            where = work.evidence.subject("validate", cycle, "report", validator)
            what = (
                "calls a claim false that is true" if said else f"lets pass that {sentence(lie.finding) if lie else ''}"
            )
            yield Difference("claims", f"{where} on {work.evidence.name(entry.miner)}", what, cycle, entry.miner)


def _compare(
    work: Recomputation, cycle: int, again: Mapping[str, _Remeasured], distances: Distances
) -> Iterator[Difference]:
    evidence, spec = work.evidence, work.evidence.facts.require_spec()
    for validator, fact in evidence.facts.reports(cycle).items():
        where = evidence.subject("validate", cycle, "report", validator)
        for given in fact.message.scores:
            mine = again.get(given.miner)
            if mine is None or given.reason == reasons_pb2.REASON_FALSE_CLAIM:
                continue
            what = _score(mine, given, spec.scoring, distances)
            if what:
                yield Difference("losses", f"{where} on {evidence.name(given.miner)}", what, cycle, given.miner)


def _score(
    again: _Remeasured, given: cycle_pb2.SubmissionScore, policy: run_pb2.ScorePolicy, distances: Distances
) -> str:
    """Return the fault of a reported score, given the local measurement; empty if there is none.

    Losses are compared as far as the report went: whether it had to stop there follows from them (`judging.reports`),
    and here, where they may differ in the last digits, another look could have been the one that decides.
    """
    mine = again.score
    if mine.reason in OF_THE_FILE or given.reason in OF_THE_FILE:
        same = mine.reason == given.reason
        return "" if same else f"{reason_name(mine.reason) or 'sound'} here, {reason_name(given.reason)} in the log"
    if not given.losses:
        return distances.add(mine.utility, given.utility)
    *early, last = looks(policy)
    here = again.upto(next((look for look in early if look.target == given.evaluated_sequences), last))
    if [(loss.domain, loss.sequence, loss.tokens) for loss in here] != [
        (loss.domain, loss.sequence, loss.tokens) for loss in given.losses
    ]:
        return "measured on other sequences than the seed draws"
    for one, other in zip(here, given.losses, strict=True):
        for side in ("before", "after"):
            what = distances.add(getattr(one, side), getattr(other, side), one.tokens)
            if what:
                return f"sequence {one.sequence} of {one.domain}, {side}: {what}"
    return ""
