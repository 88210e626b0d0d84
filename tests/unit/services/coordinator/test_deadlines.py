"""Learned deadlines."""

from __future__ import annotations

from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import WindowPolicy
from hypothesis import given
from hypothesis import strategies as st

from services.coordinator.deadlines import deadline_ms, learned_ms, window_ms
from tests.support.run import RUN
from tests.unit.services.coordinator.world import World

POLICY = WindowPolicy(floor_seconds=1, ceiling_seconds=100)


def window(world: World, cycle: int, start: int, end: int, cause: cycle_pb2.CloseCause.ValueType) -> None:
    world.now = start
    world.publish("train", cycle, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=cycle))
    world.now = end
    world.publish("train", cycle, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=cycle, cause=cause))


def test_without_history_the_ceiling_is_the_deadline() -> None:
    assert learned_ms([], POLICY) == 100_000


def test_median_and_six_mad() -> None:
    # Median 10 s, absolute deviations 0, 4, 4, 0, 8 -> MAD 4 s.
    assert learned_ms([10_000, 14_000, 6_000, 10_000, 18_000], POLICY) == 10_000 + 6 * 4_000


def test_cycles_of_equal_length_still_leave_slack() -> None:
    assert learned_ms([10_000, 10_000], POLICY) == 20_000


@given(st.lists(st.integers(0, 10**9), max_size=20))
def test_never_outside_floor_and_ceiling(history: list[int]) -> None:
    assert 1_000 <= learned_ms(history, POLICY) <= 100_000


def test_one_slow_cycle_does_not_move_the_deadline() -> None:
    assert learned_ms([5_000, 5_000, 5_000, 5_000, 99_000], POLICY) == learned_ms([5_000] * 5, POLICY)


def test_a_window_is_measured_from_opened_to_closed() -> None:
    world = World()
    window(world, 1, 1_000, 7_000, cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    assert window_ms(world.facts, world.facts.window("train", 1)) == 6_000
    assert window_ms(world.facts, world.facts.window("train", 2)) is None


def test_a_window_that_ran_into_its_deadline_is_measured_to_the_last_act_inside() -> None:
    world = World()
    world.now = 3_000
    world.trained("ma", 1)
    window(world, 1, 1_000, 90_000, cycle_pb2.CLOSE_CAUSE_DEADLINE)
    world.now = 95_000
    world.trained("mb", 1)
    assert window_ms(world.facts, world.facts.window("train", 1)) == 2_000


def test_a_window_in_which_nobody_acted_counts_in_full() -> None:
    world = World()
    window(world, 1, 1_000, 90_000, cycle_pb2.CLOSE_CAUSE_DEADLINE)
    assert window_ms(world.facts, world.facts.window("train", 1)) == 89_000


def test_the_deadline_is_learned_from_earlier_cycles_only() -> None:
    world = World()
    window(world, 1, 0, 4_000, cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    window(world, 2, 10_000, 60_000, cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    assert deadline_ms(world.facts, world.facts.window("train", 2), 500, POLICY) == 500 + 8_000
