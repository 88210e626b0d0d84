"""The number of people that a cycle needs: one that nobody could use is not begun.

A run's first cycle waits for `min_miners` and `min_validators`, and so does the train window of every other: while fewer have
acted in it, it stays open past its deadline. That is a pause. It ends by itself once enough are back, and costs no cycle.
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.protocol.bans import banned
from connito.wire.facts import RunFacts


@dataclass(frozen=True)
class Present:
    """The miners that trained and the validators that committed to a secret in a train window, and the numbers asked for."""

    miners: int
    validators: int
    min_miners: int
    min_validators: int

    @property
    def enough(self) -> bool:
        """Return whether the cycle may go on."""
        return self.miners >= self.min_miners and self.validators >= self.min_validators

    def __str__(self) -> str:
        return f"{self.miners} of {self.min_miners} miners and {self.validators} of {self.min_validators} validators are here"


def present(facts: RunFacts, cycle: int) -> Present:
    """Return who acted in a train window. Whoever is banned does not count."""
    windows = facts.require_spec().windows
    miners = set(facts.trained(cycle)) & set(facts.miners) - set(banned(facts))
    validators = set(facts.seed_commitments(cycle)) & set(facts.validators)
    return Present(len(miners), len(validators), windows.min_miners, windows.min_validators)


def pause(facts: RunFacts, now_ms: int) -> Present | None:
    """Return who is there in a run that waits for more, by the broker's clock; None for one that goes on."""
    window = facts.open_window if facts.spec is not None and facts.ended is None else None
    if window is None or window.name != "train" or now_ms < window.deadline_unix_ms:
        return None
    here = present(facts, window.cycle)
    return None if here.enough else here
