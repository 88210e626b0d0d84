"""From losses to the signed report: pure arithmetic over what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt

from connito.protocol.findings import Refusal
from connito.protocol.scoring.proof_of_loss import race, score_of
from connito.protocol.scoring.racing import InterimLook
from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import RunSpec

# The envelope around a report may have 1 MiB; this leaves room for it and the broker's headers.
MAX_REPORT_BYTES = 1_000_000


@dataclass(frozen=True)
class Losses:
    """Of some drawn sequences of one domain: sums of token negative log-likelihoods in nats [n], and tokens [n]."""

    sums: npt.NDArray[Any]
    tokens: npt.NDArray[Any]


@dataclass(frozen=True)
class Part:
    """The drawn sequences of a domain from place `begin` up to, without it, place `end` of the draw."""

    domain: str
    begin: int
    end: int


# What is measured at once; losses of several parts come one after the other.
Parts: TypeAlias = tuple[Part, ...]


@dataclass(frozen=True)
class Measurable:
    """Losses of one submission on drawn sequences; parts are measured when they are asked for.

    `before` and `after` are the losses without and with the submission. `unchanged`: it is the base state itself.
    """

    before: Callable[[Parts], Losses]
    after: Callable[[Parts], Losses]
    unchanged: bool


class Evaluation:
    """Losses of one submission on the drawn sequences, evaluated part by part as far as somebody looks."""

    def __init__(self, drawn: Mapping[str, Sequence[int]], measurable: Measurable, target: str) -> None:
        """Take `drawn`, the hold-outs' sequence numbers by domain in the order of evaluation."""
        self._drawn, self._measurable, self._target = drawn, measurable, target
        self._found: dict[str, list[cycle_pb2.SequenceLoss]] = {domain: [] for domain in drawn}

    @property
    def unchanged(self) -> bool:
        """Return whether the submission is the base state itself."""
        return self._measurable.unchanged

    def upto(self, look: InterimLook) -> dict[str, list[cycle_pb2.SequenceLoss]]:
        """Return losses by domain of the sequences that come up to a look. Looks are taken in their order."""
        wanted = {domain: self._count(domain, look) for domain in self._drawn}
        asked = (Part(domain, len(self._found[domain]), count) for domain, count in wanted.items())
        parts = tuple(part for part in asked if part.begin < part.end)
        if parts:
            for loss in _losses(parts, self._drawn, self._measurable):
                self._found[loss.domain].append(loss)
        return {domain: self._found[domain][:count] for domain, count in wanted.items()}

    def _count(self, domain: str, look: InterimLook) -> int:
        drawn = len(self._drawn[domain])
        return drawn if look.last else min(drawn, look.target if domain == self._target else look.general)


def score(submission: cycle_pb2.Submission, evaluation: Evaluation, spec: RunSpec) -> cycle_pb2.SubmissionScore:
    """Return the score of one submission, evaluated until a look of the policy decides."""
    raced = race(evaluation.upto, spec.holdout.domain, spec.scoring, unchanged=evaluation.unchanged)
    return score_of(submission.miner, submission.artifact.digest, raced, spec.scoring)


def _losses(
    parts: Parts, drawn: Mapping[str, Sequence[int]], measurable: Measurable
) -> Iterator[cycle_pb2.SequenceLoss]:
    # Who shares what is measured begins where the others have not: all of them need the losses before.
    after, before = measurable.after(parts), measurable.before(parts)
    named = [(part.domain, number) for part in parts for number in drawn[part.domain][part.begin : part.end]]
    for (domain, number), old, new, tokens in zip(named, before.sums, after.sums, before.tokens, strict=True):
        yield cycle_pb2.SequenceLoss(
            domain=domain, sequence=number, before=float(old), after=float(new), tokens=int(tokens)
        )


def rejected(submission: cycle_pb2.Submission, why: Refusal) -> cycle_pb2.SubmissionScore:
    """Return the score of a submission that is not measured, with the reason."""
    return cycle_pb2.SubmissionScore(
        miner=submission.miner,
        artifact_digest=submission.artifact.digest,
        reason=why.reason,
        finding=why.finding,
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
