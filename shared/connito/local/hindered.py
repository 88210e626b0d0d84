"""Watch what the participants of a run cannot do, show it, and end the wait for a run in which too few can act."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NoReturn

from connito.client.waiting import PROCESS, Wait, waits
from connito.errors import ConnitoError, Fatal, Retry
from connito.local.display import Display
from connito.platform.datadir import DataDir
from connito.runtime.compute import COMPUTE
from connito.wire.bounds import cut

EVERY = 2.0
# How long a run is waited for in which too few are left that have not given up; and one in which too few are left whom nothing
# around them hinders, while nothing at all is said in it.
GIVEN_UP_SECONDS, HINDERED_SECONDS = 10.0, 600.0
TRIED_SECONDS = 60.0
_MAX_ERROR, _MAX_NAMED = 300, 3


@dataclass(frozen=True)
class Group:
    """Processes of one kind, and how many of them a run needs."""

    names: frozenset[str]
    needed: int

    def lacks(self, hindered: Iterable[str]) -> bool:
        """Return whether too few are left."""
        return len(self.names - set(hindered)) < self.needed


@dataclass
class Hindered:
    """The obstacles in the way of a run, and since when, on the steady clock."""

    run: str
    groups: Sequence[Group]
    # Since when too few were left, and since when enough are again, by the reason to end.
    _since: dict[int, float] = field(default_factory=dict)
    _fine: dict[int, float] = field(default_factory=dict)
    _seen: frozenset[str] = frozenset()
    moved: float = field(default_factory=time.monotonic)

    def lines(self, found: Sequence[Wait]) -> list[str]:
        """Return what is to be shown: what was given up, and waits since the last look, once for a service and dependency."""
        shown = {
            (wait.service, wait.dependency, wait.run, wait.given_up): line(wait)
            for wait in sorted(found, key=attrgetter("service", "what"), reverse=True)
            if wait.given_up or f"{wait.service} {wait.what}" in self._seen
        }
        self._seen = frozenset(f"{wait.service} {wait.what}" for wait in found)
        return [*reversed(shown.values())]

    def verdict(self, found: Sequence[Wait], now: float, logs: object) -> ConnitoError | None:
        """Return why the run is waited for no longer; None while it is."""
        # Somebody else's turn at the cores is no fault of anything.
        found = [wait for wait in found if wait.dependency != COMPUTE]
        given_up = [wait for wait in found if wait.given_up]
        told = [wait for wait in found if wait.dependency != PROCESS]
        reasons: Sequence[tuple[type[ConnitoError], Sequence[Wait], float, float]] = (
            (Fatal, given_up, GIVEN_UP_SECONDS, 0.0),
            # What is tried again now and then is not listed while it is tried.
            (Retry, told, HINDERED_SECONDS, TRIED_SECONDS),
            # A process that answers, however seldom, is not stopped: it computes, on a machine that is slow.
            (Retry, found, HINDERED_SECONDS, 0.0),
        )
        for number, (kind, waiting, longest, gap) in enumerate(reasons):
            if any(group.lacks(wait.service for wait in waiting) for group in self.groups):
                self._fine.pop(number, None)
                if now - max(self._since.setdefault(number, now), self.moved) >= longest:
                    return kind(self._sentence(waiting, logs))
            elif now - self._fine.setdefault(number, now) >= gap:
                self._since.pop(number, None)
        return None

    def _sentence(self, waiting: Sequence[Wait], logs: object) -> str:
        first: Mapping[str, Wait] = {wait.service: wait for wait in reversed(waiting)}
        named = [line(first[name]) for name in sorted(first)]
        more = f"; and {len(named) - _MAX_NAMED} more" if len(named) > _MAX_NAMED else ""
        return (
            f"run {self.run} cannot go on: {'; '.join(named[:_MAX_NAMED])}{more}; logs are in {logs}. The run stays as it is: "
            "mend this and go on with `connito up`, or start another one with `connito up --new`"
        )


def line(wait: Wait) -> str:
    """Return what somebody waits for in one short line."""
    return cut(" ".join(str(wait).split()), _MAX_ERROR)


async def watch(
    data: DataDir, hindered: Hindered, display: Display, mend: Callable[[Sequence[Wait]], Awaitable[Sequence[str]]]
) -> NoReturn:
    """Look, show and `mend` for ever. Raises `Fatal` when too few are left that try, `Retry` when too few could do anything for
    long.
    """
    while True:
        found = [wait for wait in await asyncio.to_thread(waits, data) if wait.run in (hindered.run, "")]
        for done in await mend(found):
            display.say(done)
        display.hindrances(hindered.lines(found))
        error = hindered.verdict(found, time.monotonic(), data.logs)
        if error is not None:
            raise error
        await asyncio.sleep(EVERY)
