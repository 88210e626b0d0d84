"""Checks that scores, consensus, ranks and rewards follow from the reports, and the draw from the reveals. Pure."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from connito.audit.differences import Difference, Step, differing, first_difference
from connito.audit.evidence import Evidence
from connito.errors import Invalid
from connito.protocol import rules
from connito.protocol.assignment import assigned
from connito.protocol.findings import OF_THE_FILE, Refusal, Refusals, finding_of
from connito.protocol.merging.gate import Losses, Rule, finite, judge, misshapen
from connito.protocol.scoring.consensus import Consensus
from connito.protocol.scoring.counted_reports import read_reports
from connito.protocol.scoring.evaluation import MAX_REPORT_BYTES
from connito.protocol.scoring.own_work import leaning_of
from connito.protocol.scoring.proof_of_loss import score_submission
from connito.protocol.scoring.verdicts import agree, no_quorum, score_cycle, without
from connito.render import formats
from connito.v1 import cycle_pb2, reasons_pb2
from connito.views.sentences import sentence
from connito.wire.facts import RunFacts
from connito.wire.subjects import WINDOWS

# Reasons that the ranking gave, not the merge.
_OF_THE_REWARD = frozenset({reasons_pb2.REASON_BELOW_CUTOFF, reasons_pb2.REASON_PROBATION})


def cycle_rules(evidence: Evidence, cycle: int) -> Step:
    """Check the rules of draw, quorum and closing, and that validators objected to nothing else."""
    facts = evidence.facts
    broken = list(rules.faults(facts, cycle, evidence.roster.stake, said=True))
    found = [Difference("rules", _place_of(rule, cycle), sentence(rule), cycle) for rule in broken]
    for validator, fact in facts.objections(cycle).items():
        if not broken and fact.message.finding.kind != cycle_pb2.FINDING_KIND_RULE_HISTORY:
            where = evidence.subject("validate", cycle, "objection", validator)
            found.append(Difference("rules", where, "objects to a cycle that breaks no rule", cycle))
    return Step("rules", cycle, len(WINDOWS) + len(facts.objections(cycle)), tuple(found))


def _place_of(rule: cycle_pb2.Finding, cycle: int) -> str:
    closed = (
        rule.kind in (cycle_pb2.FINDING_KIND_RULE_EARLY, cycle_pb2.FINDING_KIND_RULE_WAITING) and rule.name in WINDOWS
    )
    named = rule.kind == cycle_pb2.FINDING_KIND_RULE_NAMED
    return f"{rule.name}.{cycle}.closed" if closed else f"validate.{cycle}.{'opened' if named else 'drawn'}"


def reports(evidence: Evidence, cycle: int) -> Step:
    """Check that each report covers its assignment and that its results follow from its own losses."""
    found: list[Difference] = []
    compared = left_out = 0
    for validator, fact in evidence.facts.reports(cycle).items():
        found += _report(evidence, cycle, validator, fact.message)
        compared += len(fact.message.scores)
        left_out += sum(1 for score in fact.message.scores if not score.losses and score.reason not in OF_THE_FILE)
    note = f"{left_out} without losses: only the model can tell" if left_out else ""
    return Step("reports", cycle, compared, tuple(found), note)


def _report(evidence: Evidence, cycle: int, validator: str, report: cycle_pb2.ScoreReport) -> Iterator[Difference]:
    facts, where = evidence.facts, evidence.subject("validate", cycle, "report", validator)
    settled = facts.window("submit", cycle).settled
    counted = (
        read_reports(facts, cycle) if settled is not None and facts.window("train", cycle).opened is not None else None
    )
    ignored = None if counted is None else counted.ignored.get(validator)
    if ignored is not None and ignored.finding.kind != cycle_pb2.FINDING_KIND_REPORT_LATE:
        yield Difference("reports", where, f"does not count: {sentence(ignored.finding)}", cycle)
    bare = [score.miner for score in report.scores if not score.losses and score.reason not in OF_THE_FILE]
    if bare and report.ByteSize() < MAX_REPORT_BYTES // 2:
        yield Difference(
            "reports", where, f"leaves out the losses of {len(bare)} that there was room for", cycle, bare[0]
        )
    given, duties = {score.miner for score in report.scores}, assigned(facts, cycle)
    for entry in settled.submissions if settled is not None else ():
        if entry.miner not in given and (duties is None or entry.miner in duties.get(validator, ())):
            yield Difference("reports", where, "leaves a submission out", cycle, entry.miner)
    for score in report.scores:
        what = score_fault(facts, score)
        if what:
            yield Difference("reports", f"{where} on {evidence.name(score.miner)}", what, cycle, score.miner)


def score_fault(facts: RunFacts, score: cycle_pb2.SubmissionScore) -> str:
    """Return why a score does not follow from the losses beside it; empty when it does, or when they were left out."""
    spec = facts.require_spec()
    if not score.losses:
        bare = cycle_pb2.SubmissionScore(miner=score.miner, artifact_digest=score.artifact_digest)
        return first_difference(bare, score, ("reason", "finding")) if score.reason in OF_THE_FILE else ""
    unchanged = score.reason == reasons_pb2.REASON_UNCHANGED
    try:
        again = score_submission(
            score.miner, score.artifact_digest, score.losses, spec.holdout.domain, spec.scoring, unchanged=unchanged
        )
    except Invalid as error:
        return str(error)
    return first_difference(again, score, ("losses",))


def consensus_of(evidence: Evidence, cycle: int, submissions: Sequence[cycle_pb2.Submission]) -> Consensus:
    """Recompute the consensus of the validators' reports, as the aggregator has to."""
    facts, stake = evidence.facts, evidence.roster.stake
    given = read_reports(facts, cycle)
    fault = rules.quorum_fault(facts, cycle, given, stake)
    return (
        no_quorum(facts, cycle, submissions, fault)
        if fault is not None
        else agree(facts, cycle, given, submissions, stake)
    )


def verdicts(evidence: Evidence, cycle: int) -> Step:
    """Check consensus, ranks, rewards and verdicts bit for bit, and the emission to the unit.

    Who copied whom, whose file is unusable and what share of the merge each has come from files: taken over here, and
    recomputed with the merge.
    """
    facts = evidence.facts
    scored, version = facts.scored(cycle), facts.version(cycle)
    where = evidence.subject("merge", cycle, "scored")
    if scored is None or facts.window("submit", cycle).settled is None:
        missing = version is not None
        found = [Difference("verdicts", where, "is not in the log, but the cycle has a version", cycle)]
        return Step("verdicts", cycle, 0, tuple(found if missing else ()))
    if version is None:
        return Step("verdicts", cycle, 0, note="the version, with each one's share, is not out yet")
    again = recorded_verdicts(evidence, cycle, scored, version)
    differences = [Difference("verdicts", where, what, cycle, miner) for miner, what in _differing(again, scored)]
    spent = sum(verdict.reward for verdict in scored.verdicts) + scored.unallocated
    spent += sum(standing.reward for standing in scored.validators)
    if spent != facts.require_spec().emission:
        what = f"rewards and the rest come to {formats.count(spent, 'unit')}; a cycle emits {facts.require_spec().emission}"
        differences.append(Difference("verdicts", where, what, cycle))
    return Step("verdicts", cycle, len(scored.verdicts) + len(scored.validators), tuple(differences))


def recorded_verdicts(
    evidence: Evidence, cycle: int, scored: cycle_pb2.CycleScored, version: cycle_pb2.VersionPublished | None
) -> cycle_pb2.CycleScored:
    """Recompute the cycle's result from the log, with the findings on files taken from its record."""
    submissions = evidence.facts.window("submit", cycle).submissions
    agreed = without(consensus_of(evidence, cycle, submissions), of_the_file(scored))
    weights = dict(zip(version.merged, version.weights, strict=False)) if version is not None else {}
    unmerged: Refusals = {
        verdict.miner: Refusal(verdict.reason, finding_of(verdict))
        for verdict in scored.verdicts
        if verdict.status == cycle_pb2.VERDICT_STATUS_SCORED and verdict.reason not in _OF_THE_REWARD
    }
    copies = _rejected(scored, {reasons_pb2.REASON_COPY})
    return score_cycle(evidence.facts, cycle, submissions, agreed, copies, weights, unmerged, leaning_of(scored))


def of_the_file(scored: cycle_pb2.CycleScored) -> Refusals:
    """Return the submissions that were rejected for what is in their file, with the refusal."""
    return _rejected(scored, OF_THE_FILE)


def _rejected(scored: cycle_pb2.CycleScored, reasons: Container[reasons_pb2.Reason.ValueType]) -> Refusals:
    return {
        verdict.miner: Refusal(verdict.reason, finding_of(verdict))
        for verdict in scored.verdicts
        if verdict.status == cycle_pb2.VERDICT_STATUS_REJECTED and verdict.reason in reasons
    }


def _differing(again: cycle_pb2.CycleScored, scored: cycle_pb2.CycleScored) -> Iterator[tuple[str, str]]:
    """Yield what differs in a cycle's result, with the miner whose verdict it is in."""
    if len(again.verdicts) != len(scored.verdicts):
        yield (
            "",
            f"verdicts: {formats.count(len(again.verdicts), 'entry')} recomputed, {len(scored.verdicts)} in the log",
        )
    for index, (one, other) in enumerate(zip(again.verdicts, scored.verdicts, strict=False)):
        yield from ((other.miner, what) for what in differing(one, other, path=f"verdicts[{index}]."))
    yield from (("", what) for what in differing(again, scored, ("verdicts",)))


def gate(evidence: Evidence, cycle: int) -> Step:
    """Check that the gate's published losses support its published decision."""
    facts, version = evidence.facts, evidence.facts.version(cycle)
    spec = facts.spec
    where = evidence.subject("merge", cycle, "version")
    if version is not None and (malformed := _malformed(version)):
        found = (Difference("gate", where, f"losses that no gate publishes: {malformed}", cycle),)
        return Step("gate", cycle, len(version.gate_losses), found)
    if version is None or spec is None or not version.merged:
        return Step("gate", cycle, 0, note="" if version is None else "the incumbent stayed")
    before, after = (Losses.published(version.gate_losses, side) for side in ("before", "after"))
    target = version.gate_losses[0].domain if version.gate_losses else ""
    refused = judge(before, after, Rule.of(facts, cycle))
    why = "" if refused is None else sentence(refused)
    for loss in version.gate_losses:
        summed = [losses.per_token().get(loss.domain) for losses in (before, after)]
        if loss.sequence_tokens and summed != [loss.before, loss.after]:
            why = f"the losses of {loss.domain} are not those of its sequences"
    if target != spec.holdout.domain:
        why = f"what it measured first is {target or 'nothing'!r}, not the target {spec.holdout.domain!r}"
    differences = (Difference("gate", where, f"should not have passed: {why}", cycle),) if why else ()
    return Step("gate", cycle, len(version.gate_losses), differences)


def _malformed(version: cycle_pb2.VersionPublished) -> str:
    """Return what makes a version's gate losses none. Those of an incumbent that stayed may be no numbers."""
    seen: set[str] = set()
    for loss in version.gate_losses:
        what = misshapen(loss)
        if not what and version.merged and not (finite(loss, "before") and finite(loss, "after")):
            what = "not finite"
        if loss.domain in seen:
            what = "given twice"
        if what:
            return f"{loss.domain}: {what}"
        seen.add(loss.domain)
    return ""
