"""The gate: a candidate becomes the next version only if held-out loss on the gate subset agrees. Pure.

The target's loss may not rise by more than chance explains: one-sided, paired by sequence, and never by more than the policy's
margin, which a few sequences that spread far cannot lift. It is held against the incumbent, where the noise is least, and
against the best version so far, so that what one cycle tolerates is not there again in the next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

from connito.protocol.merging.candidates import Attempt
from connito.protocol.scoring.proof_of_loss import paired
from connito.v1 import cycle_pb2
from connito.v1.cycle_pb2 import Finding
from connito.wire.facts import RunFacts

# A rise is more than chance where it lies outside this one-sided interval.
LEVEL = 0.95
# Nats. What is larger is no loss, and squares of what is not are numbers.
_LARGEST = 1e100
Side = Literal["before", "after"]
_SIDES: tuple[Side, ...] = ("before", "after")

# The parts of a hold-out that candidates are measured on: one decides, the other is only reported.
Part = Literal["gate", "report"]


def misshapen(loss: cycle_pb2.DomainLoss) -> str:
    """Return why published losses of a domain are not in the form that they are published in; empty when they are."""
    counts = loss.sequence_tokens
    if not loss.tokens:
        return "of no tokens"
    if not len(loss.before_sums) == len(loss.after_sums) == len(counts):
        return f"{len(loss.before_sums)} sums before, {len(loss.after_sums)} after and {len(counts)} token counts"
    if counts and not min(counts):
        return "a sequence without tokens"
    if counts and sum(counts) != loss.tokens:
        return f"sequences of {sum(counts)} tokens, in all {loss.tokens}"
    return ""


def finite(loss: cycle_pb2.DomainLoss, side: Side) -> bool:
    """Return whether one side of published losses has numbers only, which can be summed and squared."""
    return all(abs(value) < _LARGEST for value in (getattr(loss, side), *getattr(loss, f"{side}_sums")))


@dataclass(frozen=True)
class Losses:
    """Held-out loss by domain, the target first: sum of token negative log-likelihoods in nats, and tokens."""

    sums: dict[str, tuple[float, int]]
    # The same by sequence, where it is known: (sums, tokens).
    rows: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = field(default_factory=dict)

    @classmethod
    def published(cls, losses: Iterable[cycle_pb2.DomainLoss], side: Literal["before", "after"]) -> Self:
        """Return one side of what a version says of its losses."""
        sums, rows = {}, {}
        for loss in losses:
            sums[loss.domain] = (getattr(loss, side) * loss.tokens, loss.tokens)
            if loss.sequence_tokens:
                nll = tuple(getattr(loss, f"{side}_sums"))
                rows[loss.domain] = (nll, tuple(loss.sequence_tokens))
                sums[loss.domain] = (math.fsum(nll), sum(loss.sequence_tokens))
        return cls(sums, rows)

    def per_token(self) -> dict[str, float]:
        """Return nats per token, of the domains that were measured at all."""
        return {domain: nll / tokens for domain, (nll, tokens) in self.sums.items() if tokens}


@dataclass(frozen=True)
class Rule:
    """The losses that a candidate is held to; margins and drift are nats per token, and no drift is no bound.

    `best` are the losses of the version so far whose target loss is lowest, `lowest` those of each domain over all versions.
    """

    target: str
    general_margin: float
    target_margin: float = 0.0
    general_drift: float = 0.0
    best: Losses | None = None
    lowest: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, facts: RunFacts, cycle: int) -> Rule:
        """Return the rule of a cycle, from what the versions before it say of their losses."""
        spec = facts.require_spec()
        target, policy = spec.holdout.domain, spec.merging
        best: tuple[cycle_pb2.DomainLoss, Side] | None = None
        lowest: dict[str, float] = {}
        for version in filter(None, map(facts.version, range(1, cycle))):
            for loss, side in itertools.product(version.gate_losses, _SIDES):
                # What no gate publishes is that version's fault, and nothing that later ones are held to.
                if misshapen(loss) or not finite(loss, side):
                    continue
                if getattr(loss, side) < lowest.get(loss.domain, math.inf):
                    lowest[loss.domain] = getattr(loss, side)
                    best = (loss, side) if loss.domain == target else best
        # Without a margin the incumbent is the best one.
        held = Losses.published([best[0]], best[1]) if best and policy.gate_target_margin else None
        return cls(
            target, policy.gate_general_margin, policy.gate_target_margin, policy.gate_general_drift, held, lowest
        )

    def tolerated(self, before: Losses, after: Losses) -> float:
        """Return by how much the target's loss may rise from `before`; not at all where its sequences are not known."""
        (old, counts), (new, same) = (losses.rows.get(self.target, ((), ())) for losses in (before, after))
        if self.target_margin <= 0.0 or len(counts) < 2 or counts != same:
            return 0.0
        compared = paired(old, new, counts, 2 * LEVEL - 1)
        return min(self.target_margin, compared.high - compared.effect)

    def target_fault(self, before: Losses, after: Losses) -> Finding | None:
        """Return the finding where the target's loss lies too far above the incumbent's, or above the best version's."""
        for kind, held in (
            (cycle_pb2.FINDING_KIND_GATE_TARGET_ROSE, before),
            (cycle_pb2.FINDING_KIND_GATE_ABOVE_BEST, self.best),
        ):
            if held is not None:
                old, new = held.per_token()[self.target], after.per_token()[self.target]
                if new - old > self.tolerated(held, after):
                    return Finding(kind=kind, domain=self.target, before=old, after=new)
        return None

    def general_fault(self, domain: str, before: float, after: float) -> Finding | None:
        """Return the finding where a general domain's loss rises too far in one cycle, or over all of them."""
        drift = after - self.lowest.get(domain, before)
        if after - before > self.general_margin:
            kind, change, margin = cycle_pb2.FINDING_KIND_GATE_GENERAL_ROSE, after - before, self.general_margin
        elif self.general_drift and drift > self.general_drift:
            kind, change, margin = cycle_pb2.FINDING_KIND_GATE_GENERAL_DRIFTED, drift, self.general_drift
        else:
            return None
        return Finding(kind=kind, domain=domain, change=change, margin=margin)


@dataclass(frozen=True)
class Outcome:
    """The gate's decision. `after` are the losses of the state that stands; `refused` has what was refused before."""

    attempt: Attempt
    after: Losses
    refused: Finding


def judge(before: Losses, after: Losses, rule: Rule) -> Finding | None:
    """Return why `after` may not replace `before`; None when it may.

    Target loss must not rise by more than chance explains. Each general domain, and with that their mean, may rise by the
    general margin in a cycle and by the general drift in all. A loss that is not a number is a refusal.
    """
    old, new = before.per_token(), after.per_token()
    for domain, loss in old.items():
        if math.isnan(new[domain] - loss):
            return Finding(kind=cycle_pb2.FINDING_KIND_GATE_NOT_FINITE, domain=domain)
        target = domain == rule.target
        found = rule.target_fault(before, after) if target else rule.general_fault(domain, loss, new[domain])
        if found is not None:
            return found
    return None


def choose(
    tries: Iterable[Attempt], incumbent: Losses, measure: Callable[[Attempt], Losses | Finding], rule: Rule
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
        why = after if isinstance(after, Finding) else judge(incumbent, after, rule)
        if why is None:
            assert isinstance(after, Losses)
            if passed is None or after.per_token()[rule.target] < passed.after.per_token()[rule.target]:
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
