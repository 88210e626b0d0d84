"""The cycle under arbitrary interleavings: two replicas with partial views, crashes, and everyone acting in any order."""

from __future__ import annotations

import random

from connito.v1 import cycle_pb2, run_pb2
from connito.wire.facts import RunFacts
from connito.wire.subjects import WINDOWS
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.coordinator.handlers import WriteHead, decide
from tests.support.run import RUN, even
from tests.unit.services.coordinator.world import World

MINERS = ("ma", "mb", "mc")
VALIDATORS = ("va", "vb", "vc")
ORDER = [(cycle, window) for cycle in (1, 2) for window in WINDOWS]


class Cycle(RuleBasedStateMachine):
    """Replicas read streams at their own pace and decide on what they have; the broker admits each fact once."""

    @initialize(
        min_miners=st.integers(1, 2),
        min_validators=st.integers(1, 3),
        cancellable=st.sampled_from((False, False, True)),
    )
    def start(self, min_miners: int, min_validators: int, cancellable: bool) -> None:
        self.cancellable = cancellable
        self.world = World(min_miners=min_miners, min_validators=min_validators)
        self.views = [RunFacts(RUN), RunFacts(RUN)]
        self.read: list[set[int]] = [set(), set()]
        self.world.created()

    # What others do.
    @rule(miner=st.sampled_from(MINERS))
    def enrol(self, miner: str) -> None:
        self.world.miners(miner)

    @rule(validator=st.sampled_from(VALIDATORS))
    def join(self, validator: str) -> None:
        self.world.validators(validator)

    @rule()
    def select(self) -> None:
        self.world.selected()

    @rule(miners=st.sets(st.sampled_from(MINERS)), behaviour=st.sampled_from(("trained", "commit", "reveal")))
    def miners_act(self, miners: set[str], behaviour: str) -> None:
        world, cycle = self.world, self.world.facts.cycle
        for miner in sorted(miners & set(world.facts.miners)):
            if behaviour == "trained" and world.facts.window("train", cycle).opened:
                world.trained(miner, cycle)
            if behaviour == "commit" and world.facts.window("commit", cycle).opened:
                world.committed(miner, cycle)
            if behaviour == "reveal" and world.facts.window("submit", cycle).opened:
                world.submitted(miner, cycle)

    @rule(
        validators=st.sets(st.sampled_from(VALIDATORS)), behaviour=st.sampled_from(("seed", "reveal", "lie", "report"))
    )
    def validators_act(self, validators: set[str], behaviour: str) -> None:
        world, cycle = self.world, self.world.facts.cycle
        for validator in sorted(validators & set(world.facts.validators)):
            if behaviour == "seed" and world.facts.window("train", cycle).opened:
                world.seed_committed(validator, cycle)
            if behaviour in ("reveal", "lie") and world.facts.window("validate", cycle).opened:
                world.seed_revealed(validator, cycle, b"lie" if behaviour == "lie" else None)
            if behaviour == "report" and world.facts.drawn(cycle) is not None:
                world.reported(validator, cycle)

    @rule(
        absent=st.sets(st.sampled_from((*MINERS, *VALIDATORS)), max_size=2),
        replica=st.integers(0, 1),
        steps=st.integers(1, 10),
    )
    def most_people_act(self, absent: set[str], replica: int, steps: int) -> None:
        """What usually happens, so that runs get far."""
        self.world.selected()
        for miner, validator in zip(MINERS, VALIDATORS, strict=True):
            self.world.miners(miner)
            self.world.validators(validator)
        for _ in range(steps):
            for behaviour in ("trained", "commit", "reveal"):
                self.miners_act(set(MINERS) - absent, behaviour)
            for behaviour in ("seed", "reveal", "report"):
                self.validators_act(set(VALIDATORS) - absent, behaviour)
            self.others_work()
            self.read_everything_and_decide(replica)

    @rule()
    def others_work(self) -> None:
        cycle = self.world.facts.cycle
        self.world.settled("commit", cycle)
        self.world.settled("submit", cycle)
        if self.world.facts.window("merge", cycle).opened:
            self.world.merged(cycle)

    @rule(milliseconds=st.integers(1, 60_000))
    def time_passes(self, milliseconds: int) -> None:
        self.world.now += milliseconds

    @precondition(lambda self: self.cancellable)
    @rule()
    def cancel(self) -> None:
        self.world.ended(run_pb2.RUN_OUTCOME_CANCELLED)

    # What the replicas do.
    @rule(replica=st.integers(0, 1), data=st.data())
    def read_some(self, replica: int, data: st.DataObject) -> None:
        """Each stream advances by some messages: in order within a stream, in any order between streams."""
        for stream in sorted(self.world.sequences):
            pending = [i for i, f in enumerate(self.world.log) if f.stream == stream and i not in self.read[replica]]
            self._apply(replica, pending[: data.draw(st.integers(0, len(pending)))])

    @rule(replica=st.integers(0, 1))
    def read_everything_and_decide(self, replica: int) -> None:
        self._apply(replica, list(range(len(self.world.log))))
        self.decide(replica)

    @rule(replica=st.integers(0, 1))
    def decide(self, replica: int) -> None:
        view = self.views[replica]
        decision = decide(view, self.world.now, even)
        assert decision == decide(view, self.world.now, even)
        assert len(decision.actions) <= 1
        if view.ended is not None:
            assert all(isinstance(action.payload, WriteHead) for action in decision.actions), "the log is sealed"
            assert decision.wake_at_ms is None
        if decision.wake_at_ms is not None:
            assert decision.wake_at_ms > self.world.now, "a deadline in the past is acted on, not slept to"
        self.world.perform(decision)

    @rule(replica=st.integers(0, 1), seed=st.integers(0, 2**32))
    def crash(self, replica: int, seed: int) -> None:
        """A rebuilt projection, whatever the order and with duplicates, decides as the one that was lost."""
        known = [self.world.log[index] for index in sorted(self.read[replica])]
        again = known + known[::2]
        random.Random(seed).shuffle(again)
        rebuilt = RunFacts(RUN)
        for stored in again:
            rebuilt.add(stored)
        assert decide(rebuilt, self.world.now, even) == decide(self.views[replica], self.world.now, even)
        self.views[replica] = rebuilt

    def _apply(self, replica: int, indices: list[int]) -> None:
        for index in indices:
            self.views[replica].add(self.world.log[index])
            self.read[replica].add(index)

    # What must hold in the log.
    @invariant()
    def windows_open_in_order_and_one_at_a_time(self) -> None:
        if not hasattr(self, "world"):
            return
        facts, still_open = self.world.facts, 0
        expected_next = True
        for cycle, window in ORDER:
            is_open = facts.window(window, cycle).opened is not None
            assert expected_next or not is_open, f"{window} of {cycle} opened before the window before it was closed"
            is_closed = facts.window(window, cycle).closed is not None
            assert is_open or not is_closed
            expected_next = is_closed
            still_open += is_open and not is_closed
        assert still_open <= 1

    @invariant()
    def a_window_closes_for_a_reason(self) -> None:
        if not hasattr(self, "world"):
            return
        for cycle, window in ORDER:
            opened, closed = (self.world.facts.fact(window, cycle, kind) for kind in ("opened", "closed"))
            if opened is None or closed is None:
                continue
            assert isinstance(opened.message, cycle_pb2.WindowOpened)
            assert isinstance(closed.message, cycle_pb2.WindowClosed)
            if closed.message.cause == cycle_pb2.CLOSE_CAUSE_DEADLINE:
                assert closed.time_unix_ms >= opened.message.deadline_unix_ms
            else:
                self._all_acted(window, cycle, opened.message)

    def _all_acted(self, window: str, cycle: int, opened: cycle_pb2.WindowOpened) -> None:
        facts = self.world.facts
        drawn = facts.drawn(cycle)
        for key in opened.expected:
            if window == "train":
                assert key in facts.seed_commitments(cycle) or key in facts.trained(cycle)
            if window in ("commit", "submit"):
                assert key in facts.window(window, cycle).accepted
            if window == "validate" and drawn is not None and key in drawn.validators:
                assert key in facts.reports(cycle)
        if window == "merge":
            assert facts.version(cycle) is not None

    @invariant()
    def no_cycle_is_begun_that_nobody_could_use(self) -> None:
        if not hasattr(self, "world"):
            return
        facts = self.world.facts
        for cycle in (1, 2):
            if facts.window("train", cycle).closed is not None:
                assert len(facts.trained(cycle)) >= self.world.min_miners
                assert len(facts.seed_commitments(cycle)) >= self.world.min_validators

    @invariant()
    def a_draw_is_a_quorum_of_those_who_committed_in_time(self) -> None:
        if not hasattr(self, "world"):
            return
        for cycle in (1, 2):
            drawn = self.world.facts.drawn(cycle)
            if drawn is None:
                continue
            opened = self.world.facts.window("validate", cycle).opened
            assert opened is not None
            assert len(drawn.validators) >= self.world.min_validators
            assert sorted([*drawn.validators, *drawn.omitted]) == sorted(opened.expected)

    def teardown(self) -> None:
        """Whatever happened, a coordinator that reads on brings the run to an end once people act."""
        if not hasattr(self, "world"):
            return
        world = self.world
        event(f"reached cycle {world.facts.cycle}, ended {world.facts.ended is not None}")
        for miner, validator in zip(MINERS, VALIDATORS, strict=True):
            if world.facts.ended is None:
                world.miners(miner)
                world.validators(validator)
                world.selected()
        for _ in range(400):
            if world.facts.ended is not None:
                break
            decision = decide(world.facts, world.now, even)
            world.perform(decision)
            if not decision.actions and decision.wake_at_ms is not None:
                world.now = decision.wake_at_ms
            self.miners_act(set(MINERS), "trained")
            self.validators_act(set(VALIDATORS), "seed")
            self.others_work()
        assert world.facts.ended is not None
        world.perform(decide(world.facts, world.now, even))
        assert decide(world.facts, world.now + 10**9, even).actions == []


TestCycle = Cycle.TestCase
TestCycle.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
