"""Grounds of an outcome as data: the reason, and a `Finding` with its numbers and names.

People read sentences, which `connito.views.sentences` makes of findings. No rule writes, compares or parses one: the
fields decide, so a sentence may be reworded or translated at any time, also while a run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from connito.errors import Invalid
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.cycle_pb2 import Finding
from connito.v1.run_pb2 import RunSpec
from connito.wire.bounds import NAME_BYTES, WORDS_BYTES, cut

# `RunSpec.protocol_version`: the rules that a run is under. Those below it were of builds before the first release.
PROTOCOL_VERSION = 3

Outcome: TypeAlias = (
    cycle_pb2.Refused
    | cycle_pb2.SubmissionScore
    | cycle_pb2.Verdict
    | cycle_pb2.ValidatorStanding
    | cycle_pb2.VersionPublished
)

# Reasons that a submission's file gave, not a loss: its sender's doing, not the machine's or the store's.
OF_THE_FILE = frozenset(
    {
        reasons_pb2.REASON_ARTIFACT_MISSING,
        reasons_pb2.REASON_DIGEST_MISMATCH,
        reasons_pb2.REASON_KEY_MISMATCH,
        reasons_pb2.REASON_OVERSIZED,
        reasons_pb2.REASON_BAD_HEADER,
        reasons_pb2.REASON_WRONG_TENSORS,
        reasons_pb2.REASON_WRONG_SHAPE,
        reasons_pb2.REASON_WRONG_DTYPE,
        reasons_pb2.REASON_NON_FINITE,
        reasons_pb2.REASON_NORM_EXCEEDED,
        reasons_pb2.REASON_BAD_CLAIM,
        reasons_pb2.REASON_FALSE_CLAIM,
    }
)


class Refusal(NamedTuple):
    """The reason why somebody was refused, left out or not paid, and its finding."""

    reason: reasons_pb2.Reason.ValueType
    finding: Finding

    @classmethod
    def of(cls, error: Invalid) -> Refusal:
        """Return the refusal for an exception, with its text and the tensor that it is about: both may quote a file at length."""
        return cls(error.reason, Finding(text=cut(str(error), WORDS_BYTES), name=cut(error.about, NAME_BYTES)))


Refusals = Mapping[str, Refusal]
"""Return the deltas by miner."""


def check_version(spec: RunSpec) -> None:
    """Raise `Invalid` for a run under rules that this program does not know."""
    if spec.protocol_version != PROTOCOL_VERSION:
        newer = spec.protocol_version > PROTOCOL_VERSION
        raise Invalid(
            f"run {spec.run} is under protocol version {spec.protocol_version}, this program knows version "
            f"{PROTOCOL_VERSION}; {'upgrade it' if newer else 'a build from before the first release began the run'}",
            reason=reasons_pb2.REASON_UNSUPPORTED_SCHEMA,
        )


def finding_of(outcome: Outcome) -> Finding:
    """Return what an outcome rests on; of one that was recorded as a sentence, the sentence as its text."""
    if outcome.HasField("finding"):
        return outcome.finding
    return Finding(text=outcome.gate_detail if isinstance(outcome, cycle_pb2.VersionPublished) else outcome.detail)
