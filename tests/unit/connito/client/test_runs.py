"""Views of a run's log by the name of the run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import cast

import pytest
from connito.client import runs
from connito.errors import NotFound
from connito.platform.session import Session
from connito.wire.facts import RunFacts
from connito.wire.log import Log
from connito.wire.roster import Roster


class Installation:
    """A session of an installation whose log is empty."""

    data = None
    roster = Roster({})

    def bus(self) -> Installation:
        return self

    async def __aenter__(self) -> Installation:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


async def _uncreated(*_: object) -> Log:
    """Read a log that holds what a miner sent to a run that does not exist, or orders about all runs."""
    log = Log(Installation.roster)
    log.runs["nope"] = RunFacts("nope")
    return log


async def _empty(*_: object) -> Log:
    return Log(Installation.roster)


@pytest.mark.parametrize("read", [_empty, _uncreated])
def test_a_run_that_is_named_and_not_there_is_an_error(
    monkeypatch: pytest.MonkeyPatch, read: Callable[..., Awaitable[Log]]
) -> None:
    monkeypatch.setattr(runs, "read_log", read)
    session = cast(Session, Installation())
    assert runs.status(session)["run"] is None
    with pytest.raises(NotFound, match="no run 'nope'; `connito job list` shows the runs"):
        runs.status(session, "nope")
