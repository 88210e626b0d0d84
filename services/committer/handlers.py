"""Decide what the committer owes a run besides answers to messages: a pure function of the run's facts."""

from __future__ import annotations

from dataclasses import dataclass

from connito.service.engine import Action, Decision
from connito.wire.facts import RunFacts

from . import settlement
from .state import Heard


@dataclass(frozen=True)
class Settle:
    """Publish what a closed window held."""

    window: str
    cycle: int


@dataclass(frozen=True)
class Acknowledge:
    """Sign a receipt for everything that miners have said so far."""


def decide(facts: RunFacts, heard: Heard) -> Decision:
    """Return windows to settle, and whether a receipt is due."""
    if facts.spec is None or facts.ended is not None:
        return Decision()
    # An action of one name is done once a second at most: a receipt is for everything that came by then.
    due = heard.tree.size > heard.covered
    receipts = [Action(f"{facts.run}/received", facts.run, Acknowledge())] if due else []
    settles = [
        Action(f"{facts.run}/{window}.{cycle}.settled", facts.run, Settle(window, cycle))
        for window, cycle in settlement.due(facts)
    ]
    return Decision([*receipts, *settles])
