"""Sentences about outcomes, one for each kind of finding; no other module words them.

Texts are free to change: no rule and no audit reads them.
"""

from __future__ import annotations

from connito.protocol.findings import Outcome, finding_of
from connito.v1 import cycle_pb2 as c
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key


def detail_of(outcome: Outcome) -> str:
    """Return the sentence about an outcome; empty where there is nothing to say."""
    return sentence(finding_of(outcome))


def sentence(finding: Finding) -> str:
    """Return a finding in words; its own text for a kind that is newer than this program."""
    template = SENTENCES.get(finding.kind)
    return finding.text if template is None else template.format(f=finding, **_words(finding))


def why_left(facts: RunFacts) -> str:
    """Return which service cannot go on with a run, and why; empty while all can."""
    return next((f"the {one.service} cannot go on ({one.action}): {one.detail}" for one in facts.paused), "")


def _words(f: Finding) -> dict[str, str]:
    """Return what a sentence may say beside the finding's own fields."""
    return {
        "interval": f"{f.effect:+.5f} nats per token ({f.low:+.5f} to {f.high:+.5f}, n = {f.sequences})",
        "miners": ", ".join(map(short_key, f.miners)),
        "original": short_key(f.copy_of),
        "refusals": "; ".join(f"{CANDIDATES.get(part.attempt, part.attempt)}: {sentence(part)}" for part in f.parts),
        "why": f.text or "no reason was given",
        "act": "commit" if f.name == "commit" else "upload and reveal",
    }


CANDIDATES = {
    c.GATE_DECISION_ACCEPTED: "all together",
    c.GATE_DECISION_WITH_GAINLESS: "with those that gained nothing alone",
    c.GATE_DECISION_WITHOUT_OUTLIERS: "without outliers",
    c.GATE_DECISION_TOP_1: "the best alone",
}

# `f` is the finding; the other names are those of `_words`.
SENTENCES: dict[int, str] = {
    c.FINDING_KIND_GAIN: "gain {interval}",
    c.FINDING_KIND_NO_GAIN: "held-out loss did not fall: gain {interval}",
    c.FINDING_KIND_UNCERTAIN_GAIN: "the gain cannot be told from chance: {interval}",
    c.FINDING_KIND_GENERAL_LOSS_ROSE: (
        "general loss rose by {f.change:.5f} nats per token over {f.count} domains; {f.margin:.5f} is allowed"
    ),
    c.FINDING_KIND_DOMAIN_LOSS_ROSE: (
        "{f.domain} loss rose by {f.change:.5f} nats per token, significantly more than {f.margin:.5f}"
    ),
    c.FINDING_KIND_LOSS_NOT_FINITE: "the model's loss is not a number with these weights",
    c.FINDING_KIND_LOSS_UNCHANGED: "held-out loss is exactly what it was before",
    c.FINDING_KIND_COPY: "a copy of what {original} committed earlier",
    c.FINDING_KIND_FALSE_CLAIM: (
        "its claim is false: of {f.name} {f.count} tokens of one expert, where {f.limit} were counted; {f.share:.0%} of the "
        "tokens differ, {f.margin:.0%} may"
    ),
    c.FINDING_KIND_LEANS: "much of it is what {original} committed earlier: {f.share:.0%} of its reward is paid",
    c.FINDING_KIND_BELOW_CUTOFF: "rank {f.rank}; the first {f.limit} are paid",
    c.FINDING_KIND_PROBATION: "useful work {f.count} of {f.limit} on probation: {f.share:.0%} of its reward is paid",
    c.FINDING_KIND_OUTLIER: "its delta lies far from the others'",
    c.FINDING_KIND_NOT_WEIGHTED: "{f.name} merges others",
    c.FINDING_KIND_BANNED: "this key is banned: {why}; ask the operator, or the run's customer, to lift it",
    c.FINDING_KIND_NEWCOMER_QUOTA: (
        "{f.limit} new keys are scored per cycle, and others committed before you in cycle {f.cycle}; commit again "
        "in the next one"
    ),
    c.FINDING_KIND_NOTHING_DRAWN: "too few validators revealed their seed, so nothing was drawn to score on",
    c.FINDING_KIND_QUORUM_MISSED: (
        "validators with {f.weight:g} of {f.total_weight:g} stake reported in time; more than half is needed"
    ),
    c.FINDING_KIND_NO_MAJORITY: "no majority of validators scored it",
    c.FINDING_KIND_GATE_REFUSALS: "{refusals}",
    c.FINDING_KIND_GATE_NOT_FINITE: "{f.domain} loss would not be a number",
    c.FINDING_KIND_GATE_TARGET_ROSE: "{f.domain} loss would rise from {f.before:.4f} to {f.after:.4f}",
    c.FINDING_KIND_GATE_ABOVE_BEST: "{f.domain} loss would be {f.after:.4f}, above {f.before:.4f} of the best version",
    c.FINDING_KIND_GATE_GENERAL_ROSE: "{f.domain} loss would rise by {f.change:.4f}, over the margin of {f.margin:.4f}",
    c.FINDING_KIND_GATE_GENERAL_DRIFTED: "{f.domain} loss would lie {f.change:.4f} above the lowest so far, over {f.margin:.4f}",
    c.FINDING_KIND_GATE_OVERFLOW: "merging {f.name} overflows",
    c.FINDING_KIND_REPORT_LATE: "late",
    c.FINDING_KIND_REPORT_NOT_DRAWN: "not in the draw",
    c.FINDING_KIND_REPORT_OTHER_SEED: "scored another seed than the one drawn",
    c.FINDING_KIND_REPORT_OTHER_STATE: "scored against another state than the cycle's",
    c.FINDING_KIND_REPORT_TWICE: "scores a miner twice",
    c.FINDING_KIND_REPORT_OTHER_ARTIFACT: "scores an artifact that was not submitted",
    c.FINDING_KIND_REPORT_NO_UTILITY: "holds a utility that is not a finite number of at least 0",
    c.FINDING_KIND_REPORT_HIGH_UTILITY: "holds a utility above {f.limit} nats per token",
    c.FINDING_KIND_REPORT_NOT_ASSIGNED: "scores {miners}, not assigned to it",
    c.FINDING_KIND_REPORT_INCOMPLETE: "leaves out {miners}, assigned to it",
    c.FINDING_KIND_DEVIATED: "agrees with consensus to {f.agreement:.0%}",
    c.FINDING_KIND_NO_REPORT: "was drawn, and no report of it counts",
    c.FINDING_KIND_SECRET_WITHHELD: "committed to a secret and did not reveal it",
    c.FINDING_KIND_NOT_ENROLLED: "you are not enrolled in run {f.name}; `connito miner run` enrols you",
    c.FINDING_KIND_RUN_ENDED: "run {f.name} has ended; nothing is accepted any more",
    c.FINDING_KIND_WINDOW_NOT_OPEN: (
        "the {f.name} window of cycle {f.cycle} is not open (the run is in cycle {f.count}); {act} after "
        "{f.name}.opened"
    ),
    c.FINDING_KIND_COMMIT_CLOSED: (
        "the commit window of cycle {f.cycle} is closed; train on the next cycle's state and commit there"
    ),
    c.FINDING_KIND_SUBMIT_CLOSED: (
        "the submit window of cycle {f.cycle} is closed; your work rolls over and is scored in the next open "
        "cycle, unless you reveal newer work there"
    ),
    c.FINDING_KIND_SUBMIT_CLOSED_FOR_GOOD: "the submit window of cycle {f.cycle} is closed and it was the last cycle",
    c.FINDING_KIND_MESSAGE_QUOTA: (
        "more than {f.limit} {f.name} messages in cycle {f.cycle}; further ones are dropped without an answer, try "
        "again in the next cycle"
    ),
    c.FINDING_KIND_COMMITMENT_STANDS: "your commitment at {f.count} stands for cycle {f.cycle}; reveal that one",
    c.FINDING_KIND_COMMITMENT_LENGTH: (
        "a commitment is {f.limit} bytes, this one has {f.count}; send the SHA-256 digest"
    ),
    c.FINDING_KIND_NO_COMMITMENT: "no commitment of yours stands for cycle {f.cycle}; commit in time in a later cycle",
    c.FINDING_KIND_NOT_OPENED: (
        "artifact, base state and salt do not open your commitment; reveal exactly what you committed to"
    ),
    c.FINDING_KIND_OTHER_BASE: (
        "cycle {f.cycle} starts from state {f.expected:.12}…, you trained from {f.name:.12}…; fetch the state that "
        "train.opened names"
    ),
    c.FINDING_KIND_NO_KEY: ("the key of a locked upload has 32 bytes and comes with the digest of what is inside"),
    c.FINDING_KIND_WRONG_REALM: "a submission is uploaded to, and named in, REALM_SUBMISSION",
    c.FINDING_KIND_TOO_LARGE: "{f.count} bytes, but the selected experts take {f.limit}; upload only their tensors",
    c.FINDING_KIND_TOO_SMALL: (
        "{f.count} bytes cannot hold the selected experts ({f.limit}); upload all tensors, unquantised"
    ),
    c.FINDING_KIND_REVEAL_TAKEN: "your reveal for cycle {f.cycle} was already taken",
    c.FINDING_KIND_NOT_REVEALED: (
        "you committed in cycle {f.cycle} and did not reveal in time; reveal late and the work rolls over"
    ),
    c.FINDING_KIND_NOT_UPLOADED: (
        "nothing was uploaded as {f.name:.12}…; ask for an upload, put the file there, then reveal"
    ),
    c.FINDING_KIND_OTHER_SIZE: "the object has {f.count} bytes, you declared {f.limit}",
    c.FINDING_KIND_RULE_NAMED: "validate names other validators than those who committed in time: it is wrong about {miners}",
    c.FINDING_KIND_RULE_DRAW: "the draw leaves out, or counts, against what was revealed before its cut: {miners}",
    c.FINDING_KIND_RULE_SEED: "the seed is not the hash of the secrets that were revealed",
    c.FINDING_KIND_RULE_QUORUM: (
        "{f.count} validators drew, with {f.weight:g} of {f.total_weight:g} votes of those that joined; it takes {f.limit} and "
        "more than half"
    ),
    c.FINDING_KIND_RULE_EARLY: "the {f.name} came {f.count} ms before its time",
    c.FINDING_KIND_RULE_WAITING: "the {f.name} window closed because everybody had acted, and {miners} had not",
    c.FINDING_KIND_RULE_HISTORY: "head {f.count} is not of the log as it was read: {f.text}",
    c.FINDING_KIND_OBJECTIVE_MET: (
        "the objective is met after cycle {f.cycle} of {f.limit}: {f.domain} loss on the gate's text is "
        "{f.effect:.4f} nats per token lower than at the start, {f.margin:g} were asked for"
    ),
}
