"""The report of a run that has just ended: its expert is deposited a moment later."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import connito.jobs.delivery as delivery
import connito.platform.log as log
import pytest
from connito.errors import Retry
from connito.library.deposit_plan import Deposit, NoDeposit


class Ended:
    """A session of a platform on which a run has ended, whose log is read again and again."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *due: bool,
        resting: bool = False,
        paused: bool = False,
        unscored: bool = False,
    ) -> None:
        self.resting, self.roster, self.looks = resting, None, 0
        self._facts: Any = SimpleNamespace(deposits={}, paused=[object()] if paused else [])
        waiting = [*due]

        async def read_log(*_: object) -> Any:
            self.looks += 1
            return SimpleNamespace(runs={"r": self._facts})

        def plan(_: object) -> Deposit | NoDeposit:
            left = waiting.pop(0) if len(waiting) > 1 else waiting[0]
            return Deposit.__new__(Deposit) if left else NoDeposit("it is there")

        monkeypatch.setattr(log, "read_log", read_log)
        monkeypatch.setattr(delivery, "plan", plan)
        monkeypatch.setattr(delivery, "lacks_scores", lambda _: unscored)
        monkeypatch.setattr(delivery, "POLL_SECONDS", 0.0)

    @asynccontextmanager
    async def bus(self) -> AsyncIterator[None]:
        """Yield nothing that is asked for."""
        yield None

    async def read(self) -> Any:
        """What a report is made of."""
        return (await delivery._read(self, "r"))[0]  # type: ignore[arg-type]


async def test_the_expert_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Ended(monkeypatch, True, True, False)
    assert await session.read() is session._facts
    assert session.looks == 3


@pytest.mark.parametrize("why", ["resting", "paused"])
async def test_not_where_nobody_deposits(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    session = Ended(monkeypatch, True, **{why: True})
    await session.read()
    assert session.looks == 1


async def test_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "DEPOSIT_SECONDS", -1.0)
    with pytest.raises(Retry, match="has not deposited its expert yet"):
        await Ended(monkeypatch, True).read()


async def test_scores_are_waited_for_longer_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "DEPOSIT_SECONDS", -1.0)
    await Ended(monkeypatch, True, True, False, unscored=True).read()
    monkeypatch.setattr(delivery, "SCORING_SECONDS", 0.0)
    with pytest.raises(Retry, match="has not deposited its expert yet"):
        await Ended(monkeypatch, True, unscored=True).read()
