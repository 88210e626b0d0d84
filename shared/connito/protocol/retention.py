"""The cycles of a run whose artifacts are kept."""

from __future__ import annotations

from connito.wire.facts import RunFacts


def horizon(facts: RunFacts) -> int:
    """Return the first cycle whose submissions, and the states it began and ended with, are kept; 0 for all of them."""
    cycles = 0 if facts.spec is None else facts.spec.retention.cycles
    return max(0, facts.cycle - cycles + 1) if cycles else 0
