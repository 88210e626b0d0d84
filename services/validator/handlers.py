"""Next actions of a validator, as a pure function of the run's facts.

joined -> train: H(secret) -> submit settled, validate opened: secret -> drawn: check, score, report

Beside that it cosigns each head of the log that it finds to be right, and objects to a cycle that breaks a rule: it takes
no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass, field

from connito.protocol import rules
from connito.protocol.beacon import secret_digest
from connito.service.engine import Action, Decision
from connito.v1.cycle_pb2 import FINDING_KIND_RULE_HISTORY, Finding
from connito.wire.facts import RunFacts

STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE", "LIBRARY")

# (facts, cycle) -> this validator's secret. Derived from its key, so that it is the same after a restart.
Secret = Callable[[RunFacts, int], bytes]


@dataclass(frozen=True)
class Join:
    """Announce this validator."""


@dataclass(frozen=True)
class Preload:
    """Load the base model and the hold-outs before the first submission is there."""


@dataclass(frozen=True)
class Unload:
    """Let go of the model of a run that has ended."""


@dataclass(frozen=True)
class CommitSeed:
    """Publish the hash of the secret."""

    cycle: int


@dataclass(frozen=True)
class Doubt:
    """Take no part while votes weigh in the log what they do not in this validator's roster."""

    cycle: int
    validators: tuple[str, ...]


@dataclass(frozen=True)
class RevealSeed:
    """Publish the secret."""

    cycle: int


@dataclass(frozen=True)
class Object:
    """Say which rule a cycle breaks, so that it is not scored."""

    cycle: int
    finding: Finding = field(hash=False)


@dataclass(frozen=True)
class Cosign:
    """Check a head of the log, and sign it too."""

    cycle: int


@dataclass(frozen=True)
class Score:
    """Score the settled submissions that it assigns to this validator, and publish the report."""

    cycle: int


Step = Join | Preload | Unload | CommitSeed | Doubt | RevealSeed | Object | Cosign | Score


def decide(facts: RunFacts, me: str, secret: Secret, loaded: Container[str], stake: rules.Stake) -> Decision:
    """Decide which actions are missing. `loaded` are the runs whose model is in memory; nothing here waits for a time."""
    steps: list[Step] = []
    if facts.spec is None:
        return Decision([], None)
    if facts.ended is not None:
        steps = [Unload()] if facts.run in loaded else []
        steps += _heads(facts, me) if me in facts.joined else []
    elif me not in facts.joined:
        steps = [Join()]
    else:
        if facts.selection is not None and facts.run not in loaded:
            steps.append(Preload())
        steps += _heads(facts, me)
        if facts.cycle:
            steps += _cycle(facts, me, secret, stake)
    return Decision([Action(_key(facts.run, step), facts.run, step) for step in steps], None)


def _key(run: str, step: Step) -> str:
    cycle = getattr(step, "cycle", 0)
    return f"{run}/{cycle}/{type(step).__name__.lower()}"


def _heads(facts: RunFacts, me: str) -> list[Step]:
    """Cosign the newest head: it stands for all before it."""
    last = facts.next_head - 1
    if me in facts.objections(max(1, facts.cycle)):
        return []
    return [Cosign(last)] if facts.head(last) is not None and me not in facts.cosigned(last) else []


def _cycle(facts: RunFacts, me: str, secret: Secret, stake: rules.Stake) -> list[Step]:
    cycle = facts.cycle
    # Who could not check the head, because what it stands for is not shown, does not act as if it held.
    if me in facts.objections(cycle) or not rules.readable(facts, cycle) or me not in facts.cosigned(cycle):
        return []
    # Looked at where it decides something: before, everything that miners do would be gone through anew for each of them.
    judging = facts.window("validate", cycle).opened is not None
    broken = (rules.fault(facts, cycle, stake) or _replayed(facts, me, cycle, secret)) if judging else None
    if broken is not None:
        return [Object(cycle, broken)]
    if facts.window("train", cycle).closed is None and me not in facts.seed_commitments(cycle):
        doubts = _miscounted(facts, me, stake)
        return [Doubt(cycle, doubts)] if doubts else [CommitSeed(cycle)]
    if _may_reveal(facts, me, cycle, secret):
        return [RevealSeed(cycle)]
    if _may_score(facts, me, cycle):
        return [Score(cycle)]
    return []


def _miscounted(facts: RunFacts, me: str, stake: rules.Stake) -> tuple[str, ...]:
    """Return whose vote weighs another stake than the roster's, of those counted since this validator last agreed to take part.
    What it agreed to stands: a roster changes later, and the run's stakes do not.
    """
    agreed = next(
        (facts.head(cycle) for cycle in reversed(facts.cycles()) if me in facts.seed_commitments(cycle)), None
    )
    since = 0 if agreed is None else agreed.sequence
    counted = facts.stakes.items()
    return tuple(key for key, fact in counted if fact.sequence > since and fact.message.stake != stake(key))


def _is_mine(facts: RunFacts, me: str, cycle: int, secret: Secret) -> bool:
    committed = facts.seed_commitment(cycle, me)
    return committed is not None and committed.digest == secret_digest(facts.run, cycle, me, secret(facts, cycle))


def _replayed(facts: RunFacts, me: str, cycle: int, secret: Secret) -> Finding | None:
    """Return that somebody put under this key what it had said in another log: its secret is known from there."""
    if me not in facts.seed_commitments(cycle) or _is_mine(facts, me, cycle, secret):
        return None
    text = "the commitment to a secret of the validator who says this was taken from another log"
    return Finding(kind=FINDING_KIND_RULE_HISTORY, count=cycle, text=text)


def _may_reveal(facts: RunFacts, me: str, cycle: int, secret: Secret) -> bool:
    """Return whether no submission can change any more, so that the seed may become known."""
    opened = facts.window("validate", cycle).opened
    return (
        opened is not None
        and me in opened.expected
        and facts.window("validate", cycle).closed is None
        and facts.window("submit", cycle).settled is not None
        and me not in facts.seed_reveals(cycle)
        and facts.drawn(cycle) is None
        and _is_mine(facts, me, cycle, secret)
    )


def _may_score(facts: RunFacts, me: str, cycle: int) -> bool:
    drawn = facts.drawn(cycle)
    return (
        drawn is not None
        and me in drawn.validators
        and facts.window("validate", cycle).closed is None
        and facts.window("submit", cycle).settled is not None
        and me not in facts.reports(cycle)
        # These are other streams than VALIDATE: what the cycle is checked against may still be on its way.
        and all(window.closed is not None for window in facts.windows(cycle)[:3])
    )
