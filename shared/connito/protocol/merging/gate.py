"""The gate: a candidate becomes the next version only if held-out loss on the gate subset agrees. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from connito.protocol.merging.candidates import Attempt
from connito.v1 import cycle_pb2
from connito.v1.cycle_pb2 import Finding

# The parts of a hold-out that candidates are measured on: one decides, the other is only reported.
Part = Literal["gate", "report"]


@dataclass(frozen=True)
class Losses:
    """Held-out loss by domain, the target first: sum of token negative log-likelihoods in nats, and tokens."""

    sums: dict[str, tuple[float, int]]
    # The same by sequence, where it is known: (sums, tokens).
    rows: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = field(default_factory=dict)

    def per_token(self) -> dict[str, float]:
        """Return nats per token, of the domains that were measured at all."""
        return {domain: nll / tokens for domain, (nll, tokens) in self.sums.items() if tokens}


@dataclass(frozen=True)
class Outcome:
    """The gate's decision. `after` are the losses of the state that stands; `refused` has what was refused before."""

    attempt: Attempt
    after: Losses
    refused: Finding


def judge(before: Losses, after: Losses, target: str, general_margin: float) -> Finding | None:
    """Return why `after` may not replace `before`; None when it may.

    Target loss must not rise. Each general domain, and with that their mean, may rise by `general_margin` nats per
    token. A loss that is not a number is a refusal.
    """
    old, new = before.per_token(), after.per_token()
    for domain, loss in old.items():
        rise = new[domain] - loss
        if math.isnan(rise):
            return Finding(kind=cycle_pb2.FINDING_KIND_GATE_NOT_FINITE, domain=domain)
        if domain == target and rise > 0:
            kind = cycle_pb2.FINDING_KIND_GATE_TARGET_ROSE
            return Finding(kind=kind, domain=domain, before=loss, after=new[domain])
        if rise > general_margin and domain != target:
            kind = cycle_pb2.FINDING_KIND_GATE_GENERAL_ROSE
            return Finding(kind=kind, domain=domain, change=rise, margin=general_margin)
    return None


def choose(
    tries: Iterable[Attempt],
    incumbent: Losses,
    measure: Callable[[Attempt], Losses | Finding],
    target: str,
    general_margin: float,
) -> Outcome:
    """Return the first attempt that the gate lets through, else the incumbent. Of those with and without submissions that
    gained nothing alone, it is the one with the lower target loss.

    `measure` builds a candidate and gives its losses, or why there is no such candidate.
    """
    refused: list[Finding] = []
    passed: Outcome | None = None
    for attempt in tries:
        if passed is not None and attempt.decision != cycle_pb2.GATE_DECISION_WITH_GAINLESS:
            break
        after = measure(attempt)
        why = after if isinstance(after, Finding) else judge(incumbent, after, target, general_margin)
        if why is None:
            assert isinstance(after, Losses)
            if passed is None or after.per_token()[target] < passed.after.per_token()[target]:
                passed = Outcome(attempt, after, _refusals(refused))
            continue
        if passed is not None:
            break
        why.attempt = attempt.decision
        refused.append(why)
    if passed is not None:
        return passed
    if not refused:
        return Outcome(Attempt(cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE, ()), incumbent, Finding())
    return Outcome(Attempt(cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, ()), incumbent, _refusals(refused))


def _refusals(refused: list[Finding]) -> Finding:
    return Finding(kind=cycle_pb2.FINDING_KIND_GATE_REFUSALS, parts=refused) if refused else Finding()
