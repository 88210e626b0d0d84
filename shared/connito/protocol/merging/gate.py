"""The gate: a candidate becomes the next version only if held-out loss on the gate subset agrees. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from connito.protocol.merging.candidates import Attempt
from connito.v1 import cycle_pb2

# The parts of a hold-out that candidates are measured on: one decides, the other is only reported.
Part = Literal["gate", "report"]


@dataclass(frozen=True)
class Losses:
    """Held-out loss by domain, the target first: sum of token negative log-likelihoods in nats, and tokens."""

    sums: dict[str, tuple[float, int]]
    # The same by sequence, where it is known: (sums, tokens).
    rows: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = field(default_factory=dict)

    def per_token(self) -> dict[str, float]:
        """Nats per token, of the domains that were measured at all."""
        return {domain: nll / tokens for domain, (nll, tokens) in self.sums.items() if tokens}


@dataclass(frozen=True)
class Outcome:
    """What the gate decided. `after` are the losses of the state that stands; `detail` says what was refused and why."""

    attempt: Attempt
    after: Losses
    detail: str


def judge(before: Losses, after: Losses, target: str, general_margin: float) -> str:
    """Why `after` may not replace `before`; empty when it may.

    Target loss must not rise. Each general domain, and with that their mean, may rise by `general_margin` nats per
    token. A loss that is not a number is a refusal.
    """
    old, new = before.per_token(), after.per_token()
    for domain, loss in old.items():
        rise = new[domain] - loss
        if math.isnan(rise):
            return f"{domain} loss would not be a number"
        if domain == target and rise > 0:
            return f"{domain} loss would rise from {loss:.4f} to {new[domain]:.4f}"
        if rise > general_margin and domain != target:
            return f"{domain} loss would rise by {rise:.4f}, over the margin of {general_margin:.4f}"
    return ""


def choose(
    tries: Iterable[Attempt],
    incumbent: Losses,
    measure: Callable[[Attempt], Losses | str],
    target: str,
    general_margin: float,
) -> Outcome:
    """The first attempt that the gate lets through, else the incumbent.

    `measure` builds a candidate and gives its losses, or says why there is no such candidate.
    """
    refusals: list[str] = []
    for attempt in tries:
        after = measure(attempt)
        why = after if isinstance(after, str) else judge(incumbent, after, target, general_margin)
        if not why:
            assert isinstance(after, Losses)
            return Outcome(attempt, after, "; ".join(refusals))
        refusals.append(f"{_NAMES[attempt.decision]}: {why}")
    if not refusals:
        return Outcome(Attempt(cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE, ()), incumbent, "")
    return Outcome(Attempt(cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, ()), incumbent, "; ".join(refusals))


_NAMES: Mapping[int, str] = {
    cycle_pb2.GATE_DECISION_ACCEPTED: "all together",
    cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS: "without outliers",
    cycle_pb2.GATE_DECISION_TOP_1: "the best alone",
}
