"""Doing the computing of a run again, from the artifacts that its log names: merges, and the deposited expert.

These need no model. What does (`remeasure`) is beside it; either is compared with what the log says came out.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from connito.audit.artifacts import Artifacts
from connito.audit.coded_step import step_fault
from connito.audit.differences import Difference, Step, differing, first_difference
from connito.audit.distances import Distances
from connito.audit.evidence import Evidence
from connito.audit.judging import consensus_of, of_the_file
from connito.data.corpus import Corpus
from connito.errors import Invalid
from connito.protocol.findings import OF_THE_FILE, Refusal, Refusals
from connito.protocol.holdout import draw_to_score, subsets
from connito.protocol.merging.cycle import Measure, Merged, merge_cycle
from connito.protocol.merging.earlier import EarlierWork, earlier_works
from connito.protocol.merging.opened import Files
from connito.protocol.sequences import sequences
from connito.runtime.progress import Notify, silent
from connito.v1 import cycle_pb2, run_pb2
from connito.wire import subjects
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts
from connito.wire.private import placed

# Fields of a version that are not recomputed: losses have a comparison of their own.
_MEASURED = ("gate_losses", "losses")
# Nor are the bytes of a coded step: another library compresses them otherwise. What they decode to is checked.
_COMPRESSED = ("step",)


@dataclass
class Recomputation:
    """Inputs of a recomputation. `measure` gives losses of a state for the gate; None where there is no model."""

    evidence: Evidence
    artifacts: Artifacts
    tolerance: float
    measure: Measure | None = None
    say: Notify = silent


def merge(work: Recomputation, cycle: int) -> Step:
    """Check the cycle's result and version bit for bit: copies, weights, outer step, momentum, and the gate."""
    evidence, facts = work.evidence, work.evidence.facts
    version, scored = facts.version(cycle), facts.scored(cycle)
    if version is None or scored is None or facts.window("submit", cycle).settled is None:
        return Step("merge", cycle, 0, note="nothing was merged yet")
    work.say(f"merging cycle {cycle} again")
    try:
        with tempfile.TemporaryDirectory(prefix="connito-audit-") as folder:
            merged = _merge(work, cycle, version, scored, Path(folder))
    except Invalid as error:
        where = evidence.subject("merge", cycle, "version")
        return Step("merge", cycle, 1, (Difference("merge", where, f"cannot be recomputed: {error}", cycle),))
    distances = Distances(work.tolerance)
    found = tuple(_compare(work, cycle, merged, version, scored, distances))
    note = distances.note() if work.measure is not None else "the gate's losses are taken from the log"
    return Step("merge", cycle, 2, found, note)


def _merge(
    work: Recomputation,
    cycle: int,
    version: cycle_pb2.VersionPublished,
    scored: cycle_pb2.CycleScored,
    folder: Path,
) -> Merged:
    facts = work.evidence.facts
    submissions = facts.window("submit", cycle).submissions
    agreed = consensus_of(work.evidence, cycle, submissions)
    files, unusable = _files(work, cycle, submissions, of_the_file(scored))
    return merge_cycle(facts, cycle, submissions, agreed, unusable, files, work.measure or version, folder)


def _files(
    work: Recomputation, cycle: int, submissions: Sequence[cycle_pb2.Submission], recorded: Refusals
) -> tuple[Files, Refusals]:
    """Return the files of the submissions that were merged; one that is missing only here cannot be recomputed."""
    facts, artifacts = work.evidence.facts, work.artifacts
    opened, previous = facts.window("train", cycle).require_opened(), facts.version(cycle - 1)
    parent = artifacts.path(opened.state)
    momentum = None if previous is None else artifacts.path(previous.outer_state)
    states: dict[str, Path] = {}
    bases: dict[str, Path] = {}
    unusable: dict[str, Refusal] = {}
    for entry in submissions:
        if entry.artifact.digest not in artifacts.paths and entry.miner in recorded:
            unusable[entry.miner] = recorded[entry.miner]
            continue
        states[entry.miner] = artifacts.path(entry.artifact)
        bases[entry.miner] = artifacts.path(entry.base_state) if entry.base_state.digest else parent
    earlier = [
        EarlierWork(entry, artifacts.path(entry.artifact), artifacts.path(entry.base_state))
        for entry in earlier_works(facts, cycle)
    ]
    return Files(parent, momentum, states, bases, earlier), unusable


def _compare(
    work: Recomputation,
    cycle: int,
    merged: Merged,
    version: cycle_pb2.VersionPublished,
    scored: cycle_pb2.CycleScored,
    distances: Distances,
) -> Iterator[Difference]:
    evidence = work.evidence
    where = evidence.subject("merge", cycle, "version")
    for kind in ("gate_losses", "losses"):
        again, recorded = getattr(merged.version, kind), getattr(version, kind)
        for what in _losses(kind, again, recorded, distances):
            yield Difference("merge", where, what, cycle)
    # What the gate refused is told with its losses, which are another machine's to the last digits.
    skip = ("before", "after", "change") if distances.largest else ()
    for what in differing(merged.scored, scored, skip):
        yield Difference("merge", evidence.subject("merge", cycle, "scored"), what, cycle)
    for what in differing(merged.version, version, (*_MEASURED, *_COMPRESSED, *skip)):
        yield Difference("merge", where, what, cycle)
    what = step_fault(evidence.facts, work.artifacts, version, wanted=merged.step is not None)
    if what:
        yield Difference("merge", where, what, cycle)


def _losses(
    kind: str,
    again: Sequence[cycle_pb2.DomainLoss],
    recorded: Sequence[cycle_pb2.DomainLoss],
    distances: Distances,
) -> Iterator[str]:
    if [(loss.domain, loss.tokens) for loss in again] != [(loss.domain, loss.tokens) for loss in recorded]:
        yield f"{kind}: other domains or token counts than recomputed"
        return
    for one, other in zip(again, recorded, strict=True):
        for side in ("before", "after"):
            what = distances.add(getattr(one, side), getattr(other, side))
            if what:
                yield f"{kind} of {one.domain}, {side}: {what}"
        yield from _sequences(kind, one, other, distances)


def _sequences(
    kind: str, again: cycle_pb2.DomainLoss, recorded: cycle_pb2.DomainLoss, distances: Distances
) -> Iterator[str]:
    """Yield the differences sequence by sequence, where the version has losses in that detail; older ones do not."""
    if not recorded.sequence_tokens:
        return
    if list(again.sequence_tokens) != list(recorded.sequence_tokens):
        yield f"{kind} of {again.domain}: other sequences than recomputed"
        return
    for side in ("before_sums", "after_sums"):
        for one, other, tokens in zip(
            getattr(again, side), getattr(recorded, side), again.sequence_tokens, strict=False
        ):
            what = distances.add(one / tokens, other / tokens)
            if what:
                yield f"{kind} of {again.domain}, {side}: {what}"
                return


def draws(work: Recomputation, cycle: int) -> Step:
    """Check that reports use the held-out sequences that the seed draws from each hold-out's scoring part."""
    facts = work.evidence.facts
    drawn = facts.drawn(cycle)
    if drawn is None or facts.spec is None:
        return Step("draws", cycle, 0, note="nothing was drawn")
    try:
        expected = draw_of(facts.spec, work.artifacts, drawn.seed)
    except Invalid as error:
        where = work.evidence.subject("validate", cycle, "drawn")
        return Step("draws", cycle, 1, (Difference("draws", where, f"cannot be drawn again: {error}", cycle),))
    found, compared, racing = [], 0, facts.spec.scoring.minimum_sequences > 0
    for validator, fact in facts.reports(cycle).items():
        for score in fact.message.scores:
            compared += 1
            if score.losses and not _quotes(score.losses, expected, racing=racing):
                where = f"{work.evidence.subject('validate', cycle, 'report', validator)} on "
                where += work.evidence.name(score.miner)
                what = "measured on other sequences than the seed draws"
                found.append(Difference("draws", where, what, cycle, score.miner))
    return Step("draws", cycle, compared, tuple(found))


def _quotes(losses: Sequence[cycle_pb2.SequenceLoss], expected: list[tuple[str, int]], *, racing: bool) -> bool:
    """Return whether losses are of the drawn sequences: all of them, with racing a beginning of each domain's."""
    quoted = [(loss.domain, loss.sequence) for loss in losses]
    if not racing:
        return quoted == expected
    domains = list(dict.fromkeys(domain for domain, _ in expected))
    counts = Counter(domain for domain, _ in quoted)
    began = [
        pair
        for domain in domains
        for pair in [pair for pair in expected if pair[0] == domain][: max(1, counts[domain])]
    ]
    return quoted == began


def draw_of(spec: run_pb2.RunSpec, artifacts: Artifacts, seed: bytes) -> list[tuple[str, int]]:
    """Return (domain, sequence number) that a seed draws, the target first, in the order in which they are evaluated.

    Raises `Invalid` without the hold-outs.
    """
    drawn: list[tuple[str, int]] = []
    for corpus in (spec.holdout, *spec.general_holdouts):
        rows = sequences(Corpus.load(artifacts.path(corpus.artifact)), spec)
        pool = subsets(rows, spec, corpus.domain).score
        drawn += [(corpus.domain, number) for number in draw_to_score(seed, corpus.domain, pool, spec)]
    return drawn


def refused_content(work: Recomputation, cycle: int) -> Step:
    """Check reveals that were refused for their artifact's content, where the artifact still exists."""
    from connito.audit.artifacts import refused_reveals
    from connito.protocol.coding import decoded
    from connito.protocol.submission import read_header, validate_move
    from connito.wire.locked import unlocked

    evidence, facts, found, compared = work.evidence, work.evidence.facts, [], 0
    for entry in refused_reveals(evidence):
        path = work.artifacts.paths.get(entry.ref.digest)
        spec, selection = facts.spec, facts.selection
        if entry.cycle != cycle or path is None or spec is None or selection is None:
            continue
        compared += 1
        refused = _refusal_of(facts, cycle, entry.miner, entry.ref.digest, evidence)
        opened = facts.window("train", cycle).opened
        try:
            base = work.artifacts.paths.get(opened.state.digest) if opened is not None else None
            layout = read_header(work.artifacts.path(selection.initial_state))
            with tempfile.TemporaryDirectory(prefix="connito-unlock-") as folder:
                clear = unlocked(path, entry.ref, Path(folder))
                # Where θ_t is lost, what is coded stands for nothing.
                rows = clear if base is None else decoded(clear, base, spec.training, Path(folder))
                validate_move(rows, layout, base, spec, selection)
        except Invalid:
            continue
        name = reason_name(refused.reason) if refused is not None else "unknown"
        where = evidence.subject("submit", cycle, "refused", entry.miner)
        what = f"refused as {name}, but the artifact {entry.ref.digest[:12]}… is in order"
        found.append(Difference("content", where, what, cycle, entry.miner))
    return Step("content", cycle, compared, tuple(found))


def _refusal_of(facts: RunFacts, cycle: int, miner: str, digest: str, evidence: Evidence) -> cycle_pb2.Refused | None:
    for fact in facts.window("submit", cycle).refused.values():
        refused = fact.message
        said = evidence.said.get(refused.ingress_sequence)
        if refused.miner == miner and refused.reason in OF_THE_FILE and said is not None:
            assert isinstance(said.message, cycle_pb2.Reveal)
            if said.message.artifact.digest == digest:
                return refused
    return None


def expert(work: Recomputation) -> Step:
    """Check the library's expert, record and card, byte for byte, against the final version and the log."""
    deposited = [fact.message for fact in work.evidence.facts.deposits.values()]
    if not deposited:
        return Step("expert", 0, 0, note="nothing was deposited")
    found = []
    message = deposited[0]
    where = work.evidence.subject("library", 0, "deposited", message.expert_id)
    try:
        again = deposit_again(work)
        if again is None:
            what = "this run leaves nothing to deposit"
        else:
            what = _deposit_fault(again, work.artifacts.path(message.record).read_bytes(), message)
    except Invalid as error:
        what = f"cannot be recomputed: {error}"
    if what:
        found.append(Difference("expert", where, what))
    return Step("expert", 0, 3, tuple(found))


def _deposit_fault(again: Deposited, recorded: bytes, message: run_pb2.ExpertDeposited) -> str:
    """Return what is wrong with a deposit. Its card words the record for people and is taken as it is."""
    from connito.library.record import RECORD_MEDIA_TYPE, encode
    from connito.store import ref_of_bytes

    try:
        there, here = json.loads(recorded), json.loads(again.record)
    except ValueError:
        return "the record is not JSON"
    odd = sorted(key for key in there if key != "card" and there[key] != here.get(key))
    if odd:
        return f"the record says another {odd[0]} than the log"
    with_card = encode(here | {"card": there.get("card")})
    again.message.record.CopyFrom(ref_of_bytes(with_card, RECORD_MEDIA_TYPE, message.record))
    return first_difference(again.message, message)


@dataclass(frozen=True)
class Deposited:
    """The deposit that the library has to write: the fact, and the expert, its record, its card and its attestation as bytes."""

    message: run_pb2.ExpertDeposited
    files: tuple[bytes, ...]

    @property
    def record(self) -> bytes:
        """Return the record's bytes."""
        return self.files[1]


def deposit_again(work: Recomputation) -> Deposited | None:
    """Return the deposit of a run; None when it leaves nothing. Raises `Invalid` without the artifacts that it is made
    of.
    """
    from connito.library.artifact import MEDIA_TYPE, tensor_sizes, write_expert
    from connito.library.card import render
    from connito.library.deposit_plan import Deposit, plan
    from connito.library.record import CARD_MEDIA_TYPE, RECORD_MEDIA_TYPE, build_record, encode
    from connito.library.start import start_ref
    from connito.store import ref_of_bytes

    facts = without_deposits(work.evidence.facts)
    decision = plan(facts)
    if not isinstance(decision, Deposit) or facts.selection is None:
        return None
    place = placed(facts.require_spec())
    state = work.artifacts.path(decision.state)
    report: Mapping[str, Mapping[str, str]] = json.loads(work.artifacts.path(facts.selection.report).read_bytes())
    with tempfile.TemporaryDirectory(prefix="connito-audit-") as folder:
        path = Path(folder) / "expert.safetensors"
        digest = write_expert(state, path, decision.with_base(report.get("base", {})))
        data = path.read_bytes()
    signature = None
    if facts.selection.HasField("signature"):
        signature = json.loads(work.artifacts.path(facts.selection.signature).read_bytes())
    started = start_ref(facts.selection)
    parent = None if started is None else json.loads(work.artifacts.path(started).read_bytes())
    record = build_record(facts, digest, len(data), tensor_sizes(state)[0], signature, parent)
    attestation = _attest(work, decision.cycle, state)
    card = render(record).encode()
    card_ref = ref_of_bytes(card, CARD_MEDIA_TYPE, place)
    record["card"] = {"digest": card_ref.digest, "bytes": card_ref.size}
    message = run_pb2.ExpertDeposited(
        run=record["run"],
        expert_id=record["expert_id"],
        expert=ref_of_bytes(data, MEDIA_TYPE, place),
        record=ref_of_bytes(encode(record), RECORD_MEDIA_TYPE, place),
        domain=record["domain"],
        base_digest=record["base"]["manifest"],
        parents=[record["started_from"]["expert_id"]] if "started_from" in record else [],
        attestation=ref_of_bytes(attestation, "application/json", place),
    )
    return Deposited(message, (data, encode(record), card, attestation))


def _attest(work: Recomputation, cycle: int, state: Path) -> bytes:
    """Return the aggregator's part of the attestation, from its envelope in the log."""
    from connito.library.attestation import attest
    from connito.library.attestation import encode as encode_attestation

    subject = subjects.fact(work.evidence.run, "merge", cycle, "version")
    stored = next((record.data for record in work.evidence.records if record.subject == subject), None)
    envelope = work.evidence.joined.get(subject, stored)
    if envelope is None:
        raise Invalid(f"the log does not hold {subject}")
    return encode_attestation(attest(subject, envelope, state))


def without_deposits(facts: RunFacts) -> RunFacts:
    """Return the run as it was before its expert was deposited."""
    earlier = RunFacts(facts.run)
    first = min((fact.time_unix_ms for fact in facts.deposits.values()), default=math.inf)
    for fact in facts.facts.values():
        # What the run's benchmarks came to, or why to nothing, is on the record as far as it was known before.
        late = fact.key.kind in ("benchmarked", "paused") and fact.time_unix_ms > first
        if not late and (fact.key.section != "library" or fact.key.kind == "benchmarked"):
            earlier.add(fact)
    return earlier
