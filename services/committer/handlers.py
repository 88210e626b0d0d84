"""Decide what the committer owes a run besides answers to messages: a pure function of the run's facts."""

from __future__ import annotations

from dataclasses import dataclass, field

from connito.protocol.rules import checked
from connito.service.engine import Action, Decision
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts

from . import judging, settlement
from .state import Heard


@dataclass(frozen=True)
class Settle:
    """Publish what a closed window held."""

    window: str
    cycle: int


@dataclass(frozen=True)
class Examine:
    """Examine an artifact whose reveal waits for its turn."""

    artifact: ArtifactRef = field(hash=False)
    base: ArtifactRef = field(hash=False)


@dataclass(frozen=True)
class Acknowledge:
    """Sign a receipt for everything that miners have said so far."""


def decide(facts: RunFacts, heard: Heard) -> Decision:
    """Return windows to settle, reveals whose artifacts can be examined ahead of their turn, and whether a receipt is due."""
    if facts.spec is None or facts.ended is not None:
        return Decision()
    # An action of one name is done once a second at most: a receipt is for everything that came by then.
    due = checked(facts) and heard.tree.size > heard.covered
    receipts = [Action(f"{facts.run}/received", facts.run, Acknowledge())] if due else []
    settles = [
        Action(f"{facts.run}/{window}.{cycle}.settled", facts.run, Settle(window, cycle))
        for window, cycle in settlement.due(facts)
    ]
    return Decision([*receipts, *settles, *_examinations(facts)])


def _examinations(facts: RunFacts) -> list[Action]:
    actions = []
    for cycle in (facts.cycle - 1, facts.cycle):
        for reveal in facts.reveals_sent(cycle).values():
            judged = judging.judge_reveal(facts, reveal)
            if isinstance(judged, judging.CheckContent):
                key = f"{facts.run}/examine.{cycle}.{judged.artifact.digest}"
                actions.append(Action(key, facts.run, Examine(judged.artifact, judged.base)))
    return actions
