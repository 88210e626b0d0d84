"""Waiting until something new is known of a run."""

from __future__ import annotations

import asyncio

from connito.wire.facts import Fact


class Changes:
    """Take an event with `of`, look at the facts, and if they do not satisfy yet, wait for the event.

    In that order nothing is missed: a fact that arrives between looking and waiting has set the event.
    """

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}

    def of(self, run: str) -> asyncio.Event:
        """Set at the next fact of `run`."""
        return self._events.setdefault(run, asyncio.Event())

    def notice(self, fact: Fact) -> None:
        """The engine's hook: a fact arrived."""
        event = self._events.pop(fact.run, None)
        if event is not None:
            event.set()
