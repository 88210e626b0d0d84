"""The number of people that a cycle needs: one that nobody could use is not begun.

A run's first cycle waits for `min_miners` and `min_validators`. The train window of every cycle stays open past its deadline
while fewer miners have trained, or while the validators that committed to a secret could not draw (`rules.quorum_of_draw`).
That is a pause. It ends by itself once enough are back, and costs no cycle. So is a later window past what was announced in
which nobody at all was heard (`rules.deadline_ms`).
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.protocol import rules
from connito.protocol.bans import banned
from connito.render import formats
from connito.v1.run_pb2 import WindowPolicy
from connito.wire.facts import RunFacts
from connito.wire.window import Window

# A window may close this much after its deadline before somebody should be told.
OVERDUE_MS = 5000


@dataclass(frozen=True)
class Present:
    """The miners that trained and the validators that committed to a secret in a train window, and the numbers asked for.

    `quorum`: these validators may draw; `votes` are theirs, and those of all that could have been there.
    """

    miners: int
    validators: int
    min_miners: int
    min_validators: int
    quorum: bool
    votes: tuple[float, float]

    @property
    def enough(self) -> bool:
        """Return whether the cycle may go on."""
        return self.miners >= self.min_miners and self.quorum

    def __str__(self) -> str:
        here = turnout(self.miners, self.validators, self)
        if self.quorum or self.validators < self.min_validators:
            return here
        mine, total = self.votes
        return f"{here}; they have {mine:.2f} of {total:.2f} votes; more than half are needed"


@dataclass(frozen=True)
class Unheard:
    """A window past its announced deadline in which nobody was heard, of so many who were expected, and the time at which it is
    given up (Unix milliseconds)."""

    window: str
    expected: int
    until_unix_ms: int

    def __str__(self) -> str:
        return (
            f"nobody of {self.expected} was heard in the {self.window} window; are the broker and the store there, and those "
            "who act in it?"
        )


Pause = Present | Unheard


def turnout(miners: int, validators: int, asked: Present | WindowPolicy) -> str:
    """Return in words how many are here of those that are asked for."""
    return (
        f"{miners} of {formats.count(asked.min_miners, 'miner')} and "
        f"{validators} of {formats.count(asked.min_validators, 'validator')} here"
    )


def present(facts: RunFacts, cycle: int, stake: rules.Stake) -> Present:
    """Return who acted in a train window. Whoever is banned does not count."""
    windows = facts.require_spec().windows
    miners = set(facts.trained(cycle)) & set(facts.miners) - set(banned(facts))
    validators = set(facts.seed_commitments(cycle)) & set(facts.validators)
    quorum, votes = rules.quorum_of_draw(facts, cycle, validators, stake), rules.weighs(facts, cycle, validators, stake)
    return Present(len(miners), len(validators), windows.min_miners, windows.min_validators, quorum, votes)


def pause(facts: RunFacts, now_ms: int, stake: rules.Stake) -> Pause | None:
    """Return why a run waits for more people than are there, by the broker's clock; None for one that goes on."""
    window = facts.open_window if facts.spec is not None and facts.ended is None else None
    if window is None or now_ms < window.deadline_unix_ms:
        return None
    if rules.unheard(facts, window) and now_ms < (until := rules.deadline_ms(facts, window)):
        return Unheard(window.name, len(window.expected), until)
    if window.name != "train":
        return None
    here = present(facts, window.cycle, stake)
    return None if here.enough else here


def overdue(facts: RunFacts, now_ms: int, stake: rules.Stake) -> Window | None:
    """Return the open window that should have been closed by now; None where none is, and for a run that waits for people."""
    window = facts.open_window if facts.spec is not None and facts.ended is None else None
    if window is None or not window.deadline_unix_ms or pause(facts, now_ms, stake) is not None:
        return None
    return window if now_ms > rules.deadline_ms(facts, window) + OVERDUE_MS else None
