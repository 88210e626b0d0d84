"""The aggregator's turns at a run's model and at the machine's cores."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.errors import Invalid
from connito.library.deposit_plan import Deposit
from connito.library.scores import MEASURING_SECONDS
from connito.runtime.compute import ComputeBudget
from connito.service.engine import Action
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.workloads.gating import GateEvaluator

from services.aggregator import actions
from services.aggregator.actions import Aggregator
from services.aggregator.handlers import Benchmark, Preload
from tests.support.waiting import PATIENCE, until

STATE = ArtifactRef(digest="s")


class Broker:
    """A broker with a clock, and what is published there."""

    identity = None

    def __init__(self, now: float) -> None:
        self.now, self.published = now, list[Any]()
        self.host = SimpleNamespace(monotonic=lambda: 0.0)

    async def time(self) -> float:
        """Return its clock."""
        return self.now

    async def publish_fact(self, *fact: Any) -> bool:
        """Keep what is published."""
        self.published.append(fact[4])
        return True


class Shelf:
    """A store that has everything."""

    async def fetch(self, _: ArtifactRef) -> Path:
        """Return a path."""
        return Path("state")


class Model(GateEvaluator):
    """A run's model that is measured at once."""

    def _measure(self, *_: Any) -> Any:
        return None


@pytest.fixture
def aggregator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Aggregator]:
    """Return an aggregator at a time, with one core for all, of a run that ended at 0."""
    facts = SimpleNamespace(
        run="r",
        cycle=1,
        window=lambda *_: SimpleNamespace(opened=None),
        require_selection=lambda: SimpleNamespace(initial_state=STATE),
        require_spec=lambda: run_pb2.RunSpec(run="r"),
        ended_fact=SimpleNamespace(time_unix_ms=0),
    )

    async def found(*_: Any) -> Any:
        return SimpleNamespace(files={})

    for name in ("fetch_named", "fetch_base"):
        monkeypatch.setattr(actions, name, found)
    monkeypatch.setattr(actions, "plan", lambda _: Deposit(STATE, cast(Any, None)))
    monkeypatch.setattr(actions, "lacks_scores", lambda _: True)

    def at(now: float) -> Aggregator:
        made = Aggregator(
            cast(Any, Broker(now)), cast(Any, Shelf()), cast(Any, None), ComputeBudget(tmp_path, 1), lambda _: cast(Any, facts),
            lambda: True,
        )  # fmt: skip
        made.evaluators["r"] = Model(cast(Any, None), {})
        return made

    return at


async def test_scoring_lets_those_go_first_who_need_the_same_model(
    aggregator: Callable[[float], Aggregator], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, one held the model and waited for the cores, and the other held the cores and waited for the model: for ever."""
    began, go_on = threading.Event(), threading.Event()

    def measure(*given: Any) -> run_pb2.BenchmarksMeasured:
        began.set()
        assert go_on.wait(PATIENCE)
        given[-1]()
        return run_pb2.BenchmarksMeasured(run="r")

    monkeypatch.setattr(actions, "measure", measure)
    ours = aggregator(0.0)
    async with asyncio.timeout(PATIENCE):
        scoring = asyncio.create_task(ours.perform(Action("b", "r", Benchmark("r"))))
        await until(began.is_set)
        loading = asyncio.create_task(ours.perform(Action("p", "r", Preload("r"))))
        # Time to line up for the cores, where it does.
        await asyncio.wait([loading], timeout=0.2)
        go_on.set()
        await asyncio.gather(scoring, loading)
    assert len(cast(Any, ours._bus).published) == 1


@pytest.mark.parametrize(("late", "why"), [(0.0, []), (1.0, ["it was not scored within 1.5 hours of the run's end"])])
async def test_nothing_is_scored_that_would_be_too_late(
    aggregator: Callable[[float], Aggregator], monkeypatch: pytest.MonkeyPatch, late: float, why: list[str]
) -> None:
    told: list[str] = []

    def measure(*given: Any) -> run_pb2.BenchmarksMeasured:
        try:
            given[-1]()
        except Invalid as error:
            told.append(str(error))
        return run_pb2.BenchmarksMeasured(run="r")

    monkeypatch.setattr(actions, "measure", measure)
    await aggregator(MEASURING_SECONDS + late).perform(Action("b", "r", Benchmark("r")))
    assert told == why
