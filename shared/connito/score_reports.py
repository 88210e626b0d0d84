"""From losses to the signed report: pure arithmetic over what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from connito.errors import Invalid
from connito.scoring import score_submission
from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import RunSpec

# The envelope around a report may have 1 MiB; this leaves room for it and the broker's headers.
MAX_REPORT_BYTES = 1_000_000


@dataclass(frozen=True)
class Losses:
    """Of the drawn sequences of one domain: sums of token negative log-likelihoods in nats [n], and tokens [n]."""

    sums: npt.NDArray[Any]
    tokens: npt.NDArray[Any]


@dataclass(frozen=True)
class Measured:
    """What one submission does to the drawn sequences, by domain. `unchanged`: it is the base state itself."""

    after: Mapping[str, Losses]
    unchanged: bool


def score(
    submission: cycle_pb2.Submission,
    drawn: Mapping[str, Sequence[int]],
    before: Mapping[str, Losses],
    measured: Measured,
    spec: RunSpec,
) -> cycle_pb2.SubmissionScore:
    """The score of one submission; `drawn` are the hold-outs' sequence numbers by domain."""
    losses = [
        cycle_pb2.SequenceLoss(domain=domain, sequence=number, before=float(old), after=float(new), tokens=int(tokens))
        for domain, numbers in drawn.items()
        for number, old, new, tokens in zip(
            numbers, before[domain].sums, measured.after[domain].sums, before[domain].tokens, strict=True
        )
    ]
    return score_submission(
        submission.miner,
        submission.artifact.digest,
        losses,
        spec.holdout.domain,
        spec.scoring,
        unchanged=measured.unchanged,
    )


def rejected(submission: cycle_pb2.Submission, error: Invalid) -> cycle_pb2.SubmissionScore:
    """The score of a submission that cannot be measured, with the reason."""
    return cycle_pb2.SubmissionScore(
        miner=submission.miner,
        artifact_digest=submission.artifact.digest,
        reason=error.reason,
        detail=str(error),
    )


def fit(report: cycle_pb2.ScoreReport, limit: int = MAX_REPORT_BYTES) -> int:
    """Leave out per-sequence losses, of the least useful submissions first, until `report` is small enough.

    Returns of how many. What is left out can be recomputed from the seed and the store.
    """
    left_out = 0
    for item in sorted(report.scores, key=lambda item: item.utility):
        if report.ByteSize() <= limit:
            break
        if item.losses:
            del item.losses[:]
            left_out += 1
    return left_out
