"""Words for codes: windows, verdicts, decisions of the gate and reasons, each in one table."""

from __future__ import annotations

from connito.v1 import cycle_pb2
from connito.v1.reasons_pb2 import Reason
from connito.wire.enums import reason_name

WINDOWS = {
    "train": "miners train",
    "commit": "miners commit",
    "submit": "miners upload and reveal",
    "validate": "validators score",
    "merge": "merging and gating",
}

GATES = {
    cycle_pb2.GATE_DECISION_ACCEPTED: "accepted: the merge of all",
    cycle_pb2.GATE_DECISION_WITH_GAINLESS: "accepted: the merge of all, with those that gain only together",
    cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS: "accepted: the merge without outliers",
    cycle_pb2.GATE_DECISION_TOP_1: "accepted: the best one alone",
    cycle_pb2.GATE_DECISION_KEPT_INCUMBENT: "rejected: the incumbent stays",
    cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE: "nothing to merge",
}

REASONS = {
    "malformed": "the message could not be read",
    "bad-signature": "the signature does not hold",
    "unknown-type": "no such message is expected there",
    "unsupported-schema": "sent by a version that this one does not speak",
    "not-permitted": "this key may not say that",
    "unknown-run": "there is no such run",
    "not-enrolled": "the miner is not enrolled",
    "wrong-window": "the window for it was not open",
    "late-commitment": "committed after the window had closed",
    "late-reveal": "revealed too late; the work rolls over into the next cycle",
    "duplicate-commitment": "a commitment stood already; the first one counts",
    "duplicate-reveal": "the commitment was opened already",
    "no-commitment": "there was no commitment to open",
    "commitment-mismatch": "what was revealed is not what was committed to",
    "key-mismatch": "the key that was revealed does not open the upload",
    "stale-base": "the work started from another state than the cycle's",
    "not-revealed": "committed, but not revealed in time",
    "artifact-missing": "the upload is not in the store",
    "digest-mismatch": "the upload's bytes are not the ones that were named",
    "oversized": "larger than the selected experts can be",
    "bad-header": "the upload is not a well-formed safetensors file",
    "wrong-tensors": "tensors are missing, or there are others",
    "wrong-shape": "a tensor has another shape than it should",
    "wrong-dtype": "a tensor has another type than it should",
    "non-finite": "a value is NaN or infinite",
    "norm-exceeded": "the rows moved further than the policy allows",
    "no-improvement": "held-out loss did not fall",
    "not-significant": "held-out loss fell, but it may be chance",
    "retention-broken": "loss on general text rose beyond the margin",
    "copy": "the same work as an earlier commitment",
    "unchanged": "the submission is the state the cycle started from",
    "below-cutoff": "it helped, but others helped more than the policy pays for",
    "no-quorum": "too few validators; nobody was judged",
    "outlier": "it scored, but was left out of the merge as an outlier",
    "gate-rejected": "it scored, but no merge with it passed the gate",
    "incomplete-report": "it left out a submission that the seed gave it to score, so none of it counts",
    "not-assigned": "it scored a submission that the seed gave to others, so none of it counts",
    "too-few-miners": "fewer miners than the minimum enrolled in time",
    "bad-spec": "the job cannot be carried out as specified",
    "selection-failed": "no experts could be selected",
    "fault": "a service failed at this run in a way that has no name; its log has the details",
    "rule-broken": "validators found the cycle against the rules of the draw, the quorum or the closing of a window",
    "cancelled": "the customer cancelled the run",
    "store-unavailable": "the object store did not answer",
    "quota-exceeded": "too many requests by this key",
    "seed-withheld": "it committed to a secret and did not reveal it; it loses weight",
    "no-report": "no report of it counts in this cycle; it loses weight",
    "deviated": "its report is far from consensus; it loses weight",
    "probation": "it is on probation: a part of the reward is withheld",
    "newcomer-quota": "more new keys than the policy scores in one cycle; earlier commitments went first",
    "does-not-fit": "the training model does not fit into the miner's memory",
    "bad-claim": "what it says of its routed tokens cannot be read",
    "false-claim": "the router sends other numbers of its tokens to the experts than it says",
    "banned": "an operator, or the run's customer, has put this key out; the detail says why",
    "invite-invalid": "the invite is for another run, used up or expired",
    "not-invited": "the run takes only keys that were named or invited",
    "run-full": "the run has as many miners as its policy allows",
    "certificate-untrusted": "a certificate is not signed by an authority that is trusted here",
    "certificate-expired": "a certificate has expired, or is not valid yet",
    "certificate-required": "the other side asks for a client certificate",
    "start-impossible": "the library expert to start from is not there, or its terms do not allow it",
}


def clause(name: str) -> str:
    """Return the reason with this name as a clause; the empty string for none, the name itself for a newer one."""
    return REASONS.get(name, name)


def in_words(reason: Reason.ValueType) -> str:
    """Return a reason as a clause; the empty string for none, its number for one that is newer than this program."""
    return clause(reason_name(reason) if reason in Reason.values() else f"reason {reason}")


def gate(decision: cycle_pb2.GateDecision.ValueType) -> str:
    """Return the gate's decision in words."""
    return GATES.get(decision, f"decision {decision}")
