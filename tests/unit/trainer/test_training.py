"""When a miner stops although steps are left."""

from __future__ import annotations

from connito.v1 import cycle_pb2

from services.trainer.training import last_call
from tests.unit.trainer.story import RUN, Story


class Clock:
    def __init__(self) -> None:
        self.seconds = 50.0

    def __call__(self) -> float:
        return self.seconds


def opened_until(story: Story, deadline: float) -> Story:
    opened = cycle_pb2.WindowOpened(run=RUN, cycle=1, deadline_unix_ms=round(deadline * 1000))
    return story.say("train", 1, "opened", opened)


def test_stops_shortly_before_the_deadline(story: Story) -> None:
    clock = Clock()
    out_of_time = last_call(opened_until(story, 1100.0).facts, 1, 1000.0, clock)
    clock.seconds = 50 + 94.9
    assert not out_of_time()
    clock.seconds = 50 + 95.1
    assert out_of_time()


def test_keeps_a_share_of_a_short_window(story: Story) -> None:
    clock = Clock()
    out_of_time = last_call(opened_until(story, 1010.0).facts, 1, 1000.0, clock)
    clock.seconds = 50 + 8.9
    assert not out_of_time()
    clock.seconds = 50 + 9.1
    assert out_of_time()


def test_stops_when_the_window_closes(story: Story) -> None:
    out_of_time = last_call(opened_until(story, 2000.0).facts, 1, 1000.0, Clock())
    assert not out_of_time()
    story.closed("train")
    assert out_of_time()


def test_a_clock_that_is_ahead_does_not_stop_the_work(story: Story) -> None:
    clock = Clock()
    out_of_time = last_call(opened_until(story, 900.0).facts, 1, 1000.0, clock)
    clock.seconds += 10_000
    assert not out_of_time()
    story.closed("train")
    assert out_of_time()
