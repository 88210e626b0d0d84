"""Next actions of a validator, as a pure function of the run's facts.

joined -> train: H(secret) -> submit settled, validate opened: secret -> drawn: check, score, report
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass

from connito.errors import VerificationFailed
from connito.protocol.beacon import draw_seed, secret_digest
from connito.service.engine import Action, Decision
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key

STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE")

# (run, cycle) -> this validator's secret. Derived from its key, so that it is the same after a restart.
Secret = Callable[[str, int], bytes]


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
class RevealSeed:
    """Publish the secret."""

    cycle: int


@dataclass(frozen=True)
class Score:
    """Check the draw, score the settled submissions that it assigns to this validator, and publish the report."""

    cycle: int


Step = Join | Preload | Unload | CommitSeed | RevealSeed | Score


def decide(facts: RunFacts, me: str, secret: Secret, loaded: Container[str]) -> Decision:
    """Decide which actions are missing. `loaded` are the runs whose model is in memory; nothing here waits for a time."""
    steps: list[Step] = []
    if facts.spec is None:
        return Decision([], None)
    if facts.ended is not None:
        steps = [Unload()] if facts.run in loaded else []
    elif me not in facts.joined:
        steps = [Join()]
    else:
        if facts.selection is not None and facts.run not in loaded:
            steps.append(Preload())
        if facts.cycle:
            steps += _cycle(facts, me, secret)
    return Decision([Action(_key(facts.run, step), facts.run, step) for step in steps], None)


def _key(run: str, step: Step) -> str:
    cycle = getattr(step, "cycle", 0)
    return f"{run}/{cycle}/{type(step).__name__.lower()}"


def _cycle(facts: RunFacts, me: str, secret: Secret) -> list[Step]:
    cycle = facts.cycle
    if facts.window("train", cycle).closed is None and me not in facts.seed_commitments(cycle):
        return [CommitSeed(cycle)]
    if _may_reveal(facts, me, cycle, secret):
        return [RevealSeed(cycle)]
    if _may_score(facts, me, cycle):
        return [Score(cycle)]
    return []


def _may_reveal(facts: RunFacts, me: str, cycle: int, secret: Secret) -> bool:
    """Return whether no submission can change any more, so that the seed may become known."""
    opened = facts.window("validate", cycle).opened
    committed = facts.seed_commitment(cycle, me)
    return (
        opened is not None
        and me in opened.expected
        and facts.window("validate", cycle).closed is None
        and facts.window("submit", cycle).settled is not None
        and me not in facts.seed_reveals(cycle)
        and facts.drawn(cycle) is None
        and committed is not None
        and committed.digest == secret_digest(facts.run, cycle, me, secret(facts.run, cycle))
    )


def _may_score(facts: RunFacts, me: str, cycle: int) -> bool:
    drawn = facts.drawn(cycle)
    return (
        drawn is not None
        and me in drawn.validators
        and facts.window("validate", cycle).closed is None
        and facts.window("submit", cycle).settled is not None
        and me not in facts.reports(cycle)
        # TRAIN is another stream than VALIDATE: what the draw is checked against may still be on its way.
        and all(validator in facts.seed_commitments(cycle) for validator in drawn.validators)
    )


def check_draw(facts: RunFacts, cycle: int) -> bytes:
    """Recompute the seed from the reveals, which lie before `drawn` in the same stream, and return it.

    Raises `VerificationFailed` when a reveal is missing or opens another commitment, or the seed is another one.
    """
    drawn = facts.require_drawn(cycle)
    secrets = {validator: _opened_secret(facts, cycle, validator) for validator in drawn.validators}
    if not secrets or draw_seed(facts.run, cycle, secrets) != drawn.seed:
        raise VerificationFailed(
            f"the seed drawn for cycle {cycle} is not the one that {len(secrets)} reveals give: the coordinator or the "
            "log is wrong; refusing to score, audit the run"
        )
    return drawn.seed


def _opened_secret(facts: RunFacts, cycle: int, validator: str) -> bytes:
    committed = facts.seed_commitment(cycle, validator)
    revealed = facts.seed_reveal(cycle, validator)
    if committed is None or revealed is None:
        raise VerificationFailed(f"{short_key(validator)} is in the draw of cycle {cycle} but revealed no seed")
    if secret_digest(facts.run, cycle, validator, revealed.secret) != committed.digest:
        raise VerificationFailed(f"the seed of {short_key(validator)} in cycle {cycle} does not open its commitment")
    return revealed.secret
