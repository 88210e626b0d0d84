"""The level-triggered loop (ADR 1): follow the log, decide on the whole set of facts, act, and let the result be a fact.

`decide` is pure and says what is missing. Each action runs as a task of its own, one at a time per key; what was
decided but not finished when the process died is decided again by the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from connito.bus import Bus, CaughtUp, offences
from connito.errors import Fatal, Invalid, Retry
from connito.protocol.findings import check_version
from connito.runtime import logs, metrics, tracing, waiting
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import REPAIR, WAITING, Listener, here_and_now, worded
from connito.service.deaths import Deaths
from connito.service.keeping import Keeping
from connito.service.pausing import MAX_WAIT, Pauses, publish
from connito.service.unbegun import Unbegun
from connito.v1 import reasons_pb2
from connito.v1.run_pb2 import RunPaused
from connito.wire.enums import reason_name
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.kept import Kept
from connito.wire.log import Log
from connito.wire.subjects import run_of
from connito.wire.verification import by_participant

log = get_logger("engine")

# A finished action whose result has not come back through the log yet is not started again before this.
SETTLE_MS = 1000
SOONEST_MS = 20
# The broker's clock may be set: what is due by it is looked at anew so often.
LOOK_MS = 5000
# Where deciding takes long, facts gather for so many times as long before the next decision: of thousands that arrive one by
# one, deciding then takes a tenth of the time, and not the square of their number.
LONG_SECONDS, REST = 0.002, 9
FEW = 64  # Actions that are remembered before those that are done are forgotten.
# What was given up is tried again after so long: whoever has mended something need not start the service again.
GIVEN_UP_SECONDS = 600.0
# What fails where there is no action yet.
READING, DECIDING = "reading", "deciding"


@dataclass(frozen=True)
class Action:
    """An action to perform. `key` is unique among all actions of the service; equal keys are one action."""

    key: str
    run: str
    payload: object = None


@dataclass(frozen=True)
class Decision:
    """The missing actions, and the time to decide again even if nothing arrives (milliseconds of `clock`)."""

    actions: Sequence[Action] = ()
    wake_at_ms: int | None = None


@dataclass
class _State:
    """The state of one action key."""

    run: str = ""
    not_before_ms: int = 0
    failures: int = 0
    waits_for: str = ""
    blocked: bool = False
    task: asyncio.Task[None] | None = field(default=None, repr=False)

    def is_over(self, now: int) -> bool:
        """Return whether nothing here differs from what a new action begins with."""
        return self.task is None and not self.blocked and not self.failures and self.not_before_ms <= now


class Engine(Listener):
    """Runs one service's deciders over every run it follows.

    Whoever compares the time with that of a fact gives the broker's `clock` (`BrokerClock`). Waits are of time that passes.
    """

    def __init__(
        self,
        bus: Bus,
        facts: Log,
        streams: Sequence[str],
        decide: Callable[[RunFacts, int], Decision],
        perform: Callable[[Action], Awaitable[None]],
        *,
        run: str = "",
        clock: Callable[[], int] | None = None,
        on_fact: Callable[[Fact], None] | None = None,
        service: str = "",
        kept: Kept | None = None,
        of_all: bool = False,
    ) -> None:
        """Decide on what is followed: `of_all`, without answers to single miners, of which who needs one gives it to `take`."""
        self.caught_up = asyncio.Event()
        self.log = facts
        self._bus, self._streams, self._run, self._of_all = bus, tuple(streams), run, of_all
        self._decide, self._perform, self._on_fact = decide, perform, on_fact
        self._steady: Callable[[], int] = lambda: round(bus.host.monotonic() * 1000)
        self._clock = clock or self._steady
        self._changed: set[str] = set()
        self._wake_at: dict[str, int] = {}
        self._actions, self._forget_from = dict[str, _State](), FEW
        # By run, the newest cycle that somebody spoke of, and the trace in which they did.
        self._traces: dict[str, tuple[int, str]] = {}
        self._newer: set[str] = set()
        self._pauses, self._held_until = Pauses(service), dict[str, int]()
        self._unreadable: set[str] = set()
        self._keeping = Keeping(kept or Kept(), facts, bus)
        path = None if kept is None or kept.fileless else kept.path
        self._deaths = Deaths(None if path is None else path.with_suffix(".doing"))
        self._begun_ms, self._alone = 0, ""
        self._unbegun: Unbegun | None = None
        self._something = asyncio.Event()
        self._failure: asyncio.Future[None] | None = None
        WAITING.listen(self)

    def facts(self, run: str) -> RunFacts:
        """Return the facts of a run; empty if none is known."""
        return self.log.runs.get(run) or RunFacts(run)

    def wake(self, run: str = "") -> None:
        """Decide again, for one run or for all, though no fact arrived."""
        self._changed.update([run] if run else self.log.runs)
        self._something.set()

    def answered(self, dependency: str) -> None:
        """Try at once what waits for a dependency that works again."""
        for state in self._actions.values():
            if state.waits_for == dependency and state.task is None:
                state.not_before_ms, state.failures, state.waits_for = 0, 0, ""
        self.wake()

    async def run(self) -> None:
        """Follow, decide and act until cancelled; then cancel what is in flight and wait for it to end.

        Raises `Fatal`, and what the follower died of. What the decider or an action raises without such a meaning ends with the
        run that it was about (`connito.service.pausing`).
        """
        self._failure = asyncio.get_running_loop().create_future()
        loops = [asyncio.create_task(self._follow()), asyncio.create_task(self._schedule())]
        try:
            done, _ = await asyncio.wait([*loops, self._failure], return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                finished.result()
        finally:
            running = [state.task for state in self._actions.values() if state.task is not None]
            await end_tasks([*loops, *running])
            self._failure.cancel()
            self._deaths.forget()

    async def _follow(self) -> None:
        start = await self._keeping.begin()
        # Who follows one run follows that one; whoever follows all of them sees in RUNS which there are.
        if not self._run and "RUNS" in self._streams:
            self._unbegun = Unbegun(self._keeping.kept, self.log.runs)
        try:
            async for item in self._bus.follow(self._streams, self._run, start=start, of_all=self._of_all):
                if isinstance(item, CaughtUp):
                    self._keeping.keep()
                    self.caught_up.set()
                    self.wake()
                    continue
                for record in (item,) if self._unbegun is None else self._unbegun.ready(item):
                    self._apply(record)
                self.log.read(item)
                self._keeping.read(item)
        finally:
            self._keeping.kept.close()

    def take(self, record: Record) -> None:
        """Apply what was looked up and not followed."""
        self._apply(record)

    def _apply(self, record: Record) -> None:
        try:
            fact = self.log.apply(record)
        except Invalid as error:
            # What lay there before was reported when it came.
            offences.ignore(record, error, new=self.caught_up.is_set())
            if error.reason == reasons_pb2.REASON_FAULT and not by_participant(record.subject):
                self._unread(record, error)
            return
        if fact is None:
            return
        # What is numbered in the run's own section, such as receipts, is not a cycle's.
        cycle = 0 if fact.key.section == "run" else fact.key.cycle
        if (trace := logs.extract(record.headers)) and cycle >= self._traces.get(fact.run, (0, ""))[0]:
            self._traces[fact.run] = cycle, trace
        try:
            if self._on_fact is not None:
                self._on_fact(fact)
        except Fatal:
            raise
        except Exception as error:
            if here_and_now(error) is not None:
                # No fact's doing: the process ends, and the next one reads it again.
                raise
            self._unread(record, error)
        self._keeping.kept.put(fact)
        self._changed.add(fact.run)
        self._something.set()

    def _unread(self, record: Record, error: Exception) -> None:
        """Decide nothing more about a run of which a fact cannot be read here."""
        log.error("a fact makes its reader fail", subject=record.subject, sequence=record.sequence, exc_info=error)
        self._keeping.stop()
        self._unreadable.add(run_of(record.subject))
        self._leave(run_of(record.subject), READING, error)

    async def _schedule(self) -> None:
        await self.caught_up.wait()
        self._begun_ms = self._steady()
        while True:
            now = self._steady()
            due = self._changed | {run for run, at in self._wake_at.items() if at <= now}
            self._changed = set()
            self._something.clear()
            for run in sorted(due):
                self._decide_run(run, now)
            next_at = min(self._wake_at.values(), default=None)
            wait = None if next_at is None else max(0.0, (next_at - self._steady()) / 1000)
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._something.wait()

    def _decide_run(self, run: str, now: int) -> None:
        if run in self._unreadable:
            return
        if self._held_until.get(run, now) > now:
            self._wake_at[run] = self._held_until[run]
            return
        try:
            if not self._known_rules(run):
                return
            began, told = self._bus.host.monotonic(), self._clock()
            with metrics.DECIDE_SECONDS.time():
                decision = self._decide(self.facts(run), told)
            if (took := self._bus.host.monotonic() - began) > LONG_SECONDS:
                self._held_until[run] = self._steady() + round(REST * took * 1000)
        except Fatal:
            raise
        except Exception as error:
            self._undecided(run, now, error)
            return
        self._pauses.succeeded(run, DECIDING)
        WAITING.end(f"{run}/{DECIDING}")
        wakes = [] if decision.wake_at_ms is None else [now + min(LOOK_MS, decision.wake_at_ms - told)]
        self._begin(run, decision, now, wakes)

    def _undecided(self, run: str, now: int, error: Exception) -> None:
        """Decide on a run later: what there is of it makes the decision fail."""
        wait = self._pauses.failed(run, DECIDING, error)
        if wait is None:
            self._leave(run, DECIDING, error)
        self._held_until[run] = self._wake_at[run] = now + int((MAX_WAIT if wait is None else wait) * 1000)

    def _begin(self, run: str, decision: Decision, now: int, wakes: list[int]) -> None:
        self._end_waits(run, {action.key for action in decision.actions})
        if len(self._actions) > self._forget_from:  # Of each cycle there are some, and of runs no end.
            self._actions = {key: state for key, state in self._actions.items() if not state.is_over(now)}
            self._forget_from = max(FEW, 2 * len(self._actions))
        for action in decision.actions:
            state = self._actions.get(action.key) or self._actions.setdefault(action.key, self._begin_state(action))
            if state.blocked or state.task is not None:
                continue
            if state.not_before_ms > now:
                wakes.append(state.not_before_ms)
            elif self._must_wait_for_others(action.key):
                wakes.append(now + SETTLE_MS)
            else:
                self._start(action, state)
        self._wake_at.pop(run, None)
        if wakes:
            # A time that has passed already must not become a busy loop.
            self._wake_at[run] = max(min(wakes), now + SOONEST_MS)

    def _end_waits(self, run: str, wanted: set[str]) -> None:
        """Let nobody read any more of what waited and is not asked for any more, nor keep how often that failed."""
        for key, state in self._actions.items():
            if state.run == run and key not in wanted and state.task is None:
                state.failures = 0
                WAITING.end(key)

    def _begin_state(self, action: Action) -> _State:
        """Return the state of an action that is new to this process, whatever ones before it died of."""
        state, death = _State(action.run), self._deaths.of(action.key)
        if death is None:
            return state
        if death.set_aside:
            state.blocked = True
            self._leave(action.run, action.key, Invalid(death.set_aside, reason=reasons_pb2.REASON_FAULT))
        elif death.rest:
            state.not_before_ms = self._begun_ms + int(death.rest * 1000)
            ended = Retry(f"processes ended {death.unexplained} times during it", dependency=REPAIR)
            WAITING.begin(action.key, ended, action.run, death.rest)
        return state

    def _must_wait_for_others(self, key: str) -> bool:
        """Return whether an action may not begin now: what processes ended in is done with nothing beside it."""
        alone = self._deaths.of(key) is not None
        return bool(self._alone) or (alone and any(state.task is not None for state in self._actions.values()))

    def _known_rules(self, run: str) -> bool:
        """Return whether this program may act in a run; of one under newer rules, say so once."""
        spec = self.facts(run).spec
        try:
            if spec is not None:
                check_version(spec)
        except Invalid as error:
            if run not in self._newer:
                log.error("this run is left alone", run=run, reason=reason_name(error.reason), error=str(error))
            self._newer.add(run)
        return run not in self._newer

    def _leave(self, run: str, action: str, error: Exception) -> None:
        """Say in the log that this run is waited with, and go on with all others. A participant says so on its own page."""
        WAITING.give_up(f"{run}/{action}" if action in (READING, DECIDING) else action, error, run)
        notice = self._pauses.notice(self.facts(run), action, error)
        if notice is not None:
            self._start(Action(f"{run}/paused", run, notice), self._actions.setdefault(f"{run}/paused", _State(run)))

    async def _do(self, action: Action) -> None:
        if isinstance(action.payload, RunPaused):
            await publish(self._bus, action.payload)
        else:
            await self._perform(action)

    def _start(self, action: Action, state: _State) -> None:
        metrics.ACTIONS_RUNNING.inc()
        if self._deaths.of(action.key) is not None:
            self._alone = action.key
        self._deaths.begin(action.key)
        state.task = asyncio.create_task(self._act(action, state), name=action.key)

    async def _act(self, action: Action, state: _State) -> None:
        _, cause = self._traces.get(action.run, (0, ""))
        logs.bind_run(action.run)
        logs.use(cause)
        name = type(action.payload).__name__ if action.payload is not None else action.key.split(":")[0].split(".")[0]
        outcome, delay = "ok", SETTLE_MS / 1000
        try:
            with tracing.span(f"act {name}", "CONSUMER", cause, system="nats"):
                await self._do(action)
            state.failures, state.waits_for = 0, ""
            WAITING.end(action.key)
            self._pauses.succeeded(action.run, action.key)
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Fatal as error:
            outcome = "failed"
            if self._failure is not None and not self._failure.done():
                self._failure.set_exception(error)
        except Exception as error:
            outcome, delay = self._failed(action, state, error, delay)
        finally:
            metrics.ACTIONS.labels(name, outcome).inc()
            metrics.ACTIONS_RUNNING.dec()
            self._deaths.end(action.key)
            self._alone = "" if self._alone == action.key else self._alone
            state.task = None
            state.not_before_ms = self._steady() + int(delay * 1000)
            self.wake(action.run)

    def _failed(self, action: Action, state: _State, error: Exception, delay: float) -> tuple[str, float]:
        """Return what came of a failed action, and after how many seconds it may be tried again."""
        if (fault := here_and_now(error)) is not None:
            delay = waiting.delay(fault.after, state.failures)
            state.failures, state.waits_for = state.failures + 1, fault.dependency
            WAITING.begin(action.key, fault, action.run, delay)
            log.warning(
                "action will be tried again", action=action.key, waits_for=fault.dependency, error=str(fault),
                delay=round(delay, 2),
            )  # fmt: skip
            return "retry", delay
        WAITING.end(action.key)
        state.waits_for = ""
        if isinstance(error, Invalid):
            log.error("action is not possible", action=action.key, reason=reason_name(error.reason), error=str(error))
        impossible = isinstance(error, Invalid)
        wait = None if impossible else self._pauses.failed(action.run, action.key, error)
        if wait is None:
            self._leave(action.run, action.key, error)
            return "invalid" if impossible else "failed", GIVEN_UP_SECONDS
        WAITING.begin(action.key, Retry(worded(error), dependency=REPAIR), action.run, wait)
        return "failed", wait
