"""The level-triggered loop against a real log: what is missing gets done, once, whatever fails on the way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from operator import contains
from typing import Any

import pytest
from connito.errors import Fatal, Invalid, Retry
from connito.service.engine import Action, Decision, Engine
from connito.v1 import cycle_pb2
from connito.wire import subjects
from connito.wire.envelope import seal
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.log import Log
from connito.wire.roster import Roster

from tests.integration.conftest import BusFactory
from tests.support.waiting import PATIENCE, until

pytestmark = pytest.mark.integration


def opened(
    run: str, cycle: int = 1, window: cycle_pb2.Window.ValueType = cycle_pb2.WINDOW_TRAIN
) -> cycle_pb2.WindowOpened:
    return cycle_pb2.WindowOpened(run=run, cycle=cycle, window=window)


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(engine.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def bus(bus_factory: BusFactory, identities: dict[str, Identity]) -> Any:
    return await bus_factory(identities["coordinator"])


async def test_a_chain_of_decisions_runs_to_its_end(bus: Any, roster: Roster, run_id: str) -> None:
    """Each fact makes the next one missing: 20 hops of follow, decide, perform and publish."""
    await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id))

    def decide(facts: RunFacts, now: int) -> Decision:
        last = facts.cycle
        return Decision([Action(f"open.{last + 1}", facts.run, last + 1)] if 0 < last < 21 else [])

    async def perform(action: Action) -> None:
        assert isinstance(action.payload, int)
        await bus.publish_fact(run_id, "train", action.payload, "opened", opened(run_id, action.payload))

    engine = Engine(bus, Log(roster), ["TRAIN"], decide, perform, run=run_id)
    async with running(engine):
        await engine.caught_up.wait()
        began = time.perf_counter()
        await until(lambda: engine.facts(run_id).cycle == 21)
        # Whoever looked only every `SETTLE_MS` would need twenty seconds.
        assert time.perf_counter() - began < 10


async def test_nothing_is_decided_before_everything_stored_is_known(bus: Any, roster: Roster, run_id: str) -> None:
    for cycle in range(1, 101):
        await bus.publish_fact(run_id, "train", cycle, "opened", opened(run_id, cycle))
    seen: list[int] = []

    def decide(facts: RunFacts, now: int) -> Decision:
        seen.append(facts.cycle)
        return Decision()

    engine = Engine(bus, Log(roster), ["TRAIN"], decide, _nothing, run=run_id)
    async with running(engine):
        await until(lambda: bool(seen))
    assert set(seen) == {100}


async def test_one_action_per_key_at_a_time(bus: Any, roster: Roster, run_id: str) -> None:
    started: list[str] = []
    release = asyncio.Event()

    def decide(facts: RunFacts, now: int) -> Decision:
        return Decision([Action("slow", run_id), Action("other", run_id)])

    async def perform(action: Action) -> None:
        started.append(action.key)
        await release.wait()

    engine = Engine(bus, Log(roster), ["TRAIN"], decide, perform, run=run_id)
    async with running(engine):
        for cycle in (1, 2, 3):
            await bus.publish_fact(run_id, "train", cycle, "opened", opened(run_id, cycle))
        await until(lambda: engine.facts(run_id).cycle == 3)
        await until(lambda: len(started) == 2)
        engine.wake(run_id)
        await asyncio.sleep(0.1)
        assert sorted(started) == ["other", "slow"]
        release.set()
        # Still missing after it was done: started again, but not before its result had time to come back.
        await until(lambda: len(started) == 4)


async def test_a_finished_action_rests_until_its_result_had_time_to_arrive(
    bus: Any, roster: Roster, run_id: str
) -> None:
    times: list[float] = []

    async def perform(action: Action) -> None:
        times.append(time.monotonic())

    engine = Engine(bus, Log(roster), ["TRAIN"], _always(run_id), perform, run=run_id)
    async with running(engine):
        await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id))
        await until(lambda: len(times) == 2)
    assert times[1] - times[0] >= 0.99


async def test_retry_comes_again_with_growing_delay(bus: Any, roster: Roster, run_id: str) -> None:
    times: list[float] = []

    async def perform(action: Action) -> None:
        times.append(time.monotonic())
        if len(times) < 4:
            raise Retry("not yet", after=0.1)

    engine = Engine(bus, Log(roster), ["TRAIN"], _always(run_id), perform, run=run_id)
    async with running(engine):
        await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id))
        await until(lambda: len(times) == 4)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # A busy machine adds to each gap, and chance takes away half of it at most.
    assert all(gap >= 0.95 * least for gap, least in zip(gaps, (0.05, 0.1, 0.2), strict=True)), gaps


async def test_invalid_blocks_its_key_and_nothing_else(bus: Any, roster: Roster, run_id: str) -> None:
    performed: list[str] = []

    def decide(facts: RunFacts, now: int) -> Decision:
        return Decision([Action("bad", run_id), Action(f"good.{facts.cycle}", run_id)])

    async def perform(action: Action) -> None:
        performed.append(action.key)
        if action.key == "bad":
            raise Invalid("can never work")

    engine = Engine(bus, Log(roster), ["TRAIN"], decide, perform, run=run_id)
    async with running(engine):
        for cycle in (1, 2):
            await bus.publish_fact(run_id, "train", cycle, "opened", opened(run_id, cycle))
            await until(partial(contains, performed, f"good.{cycle}"))
    assert performed.count("bad") == 1


async def test_what_is_fatal_ends_the_service_and_cancels_the_rest(bus: Any, roster: Roster, run_id: str) -> None:
    cancelled = asyncio.Event()

    def decide(facts: RunFacts, now: int) -> Decision:
        return Decision([Action("hangs", run_id), Action("breaks", run_id)])

    async def perform(action: Action) -> None:
        if action.key == "breaks":
            raise Fatal("broken")
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    engine = Engine(bus, Log(roster), ["TRAIN"], decide, perform, run=run_id)
    await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id))
    with pytest.raises(Fatal):
        async with asyncio.timeout(PATIENCE):
            await engine.run()
    assert cancelled.is_set()


async def test_wakes_at_the_time_it_was_told(bus: Any, roster: Roster, run_id: str) -> None:
    calls: list[int] = []

    def decide(facts: RunFacts, now: int) -> Decision:
        calls.append(now)
        return Decision(wake_at_ms=calls[0] + 300)

    engine = Engine(bus, Log(roster), ["TRAIN"], decide, _nothing, run=run_id)
    async with running(engine):
        await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id))
        await until(lambda: any(now >= calls[0] + 300 for now in calls))
    assert len([now for now in calls if now < calls[0] + 300]) <= 3  # and not all the time until then


async def test_what_does_not_verify_is_reported_and_never_applied(
    bus: Any, roster: Roster, identities: dict[str, Identity], run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    subject = subjects.fact(run_id, "train", 1, "opened")
    coordinator, miner = identities["coordinator"], identities["miner"]
    good = seal(coordinator, subject, opened(run_id))
    tampered = type(good).FromString(good.SerializeToString())
    tampered.payload = opened(run_id, 1, cycle_pb2.WINDOW_MERGE).SerializeToString()
    lies = {
        "malformed": b"\xff\xff no envelope",
        "bad-signature": tampered.SerializeToString(),
        "not-permitted": seal(miner, subject, opened(run_id)).SerializeToString(),
        "unknown-type": seal(coordinator, subject, cycle_pb2.WindowClosed(run=run_id, cycle=1)).SerializeToString(),
    }
    for lie in lies.values():
        await bus.js.publish(subject, lie)
    other_cycle = seal(coordinator, subject, opened(run_id, 2)).SerializeToString()
    moved = seal(coordinator, subjects.fact(run_id, "train", 2, "opened"), opened(run_id)).SerializeToString()
    for lie in (other_cycle, moved):
        await bus.js.publish(subject, lie)
    await bus.publish_fact(run_id, "train", 3, "opened", opened(run_id, 3))
    heard: list[Fact] = []
    engine = Engine(
        bus, Log(roster), ["TRAIN"], lambda facts, now: Decision(), _nothing, run=run_id, on_fact=heard.append
    )
    async with running(engine):
        await engine.caught_up.wait()
    assert [fact.key.cycle for fact in heard] == [3]
    assert not engine.facts(run_id).has("train", 1, "opened")
    said = "".join(capsys.readouterr())
    assert said.count("ignored a message that does not verify") == 6
    assert all(reason in said for reason in lies)


async def test_a_new_process_decides_again_what_the_old_one_left(bus: Any, roster: Roster, run_id: str) -> None:
    """Killed between deciding and publishing: nothing was written, so it is still missing."""
    await bus.publish_fact(run_id, "train", 1, "opened", opened(run_id))
    attempts: list[str] = []

    async def publish(who: str, hang: bool, action: Action) -> None:
        attempts.append(who)
        if hang:
            await asyncio.Event().wait()
        await bus.publish_fact(run_id, "train", 2, "opened", opened(run_id, 2))

    def decide(facts: RunFacts, now: int) -> Decision:
        return Decision([] if facts.window("train", 2).opened is not None else [Action("open.2", run_id)])

    for who, hang in (("first", True), ("second", False)):
        engine = Engine(bus, Log(roster), ["TRAIN"], decide, partial(publish, who, hang), run=run_id)
        async with running(engine):
            await until(partial(contains, attempts, who))
            if not hang:
                await until(partial(has_second, engine, run_id))
    assert attempts == ["first", "second"]


def has_second(engine: Engine, run: str) -> bool:
    return engine.facts(run).has("train", 2, "opened")


async def _nothing(action: Action) -> None:
    raise AssertionError(f"{action.key} was not expected")


def _always(run: str) -> Callable[[RunFacts, int], Decision]:
    return lambda facts, now: Decision([Action("again", run)])
