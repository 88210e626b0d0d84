"""When a miner stops although steps are left."""

from __future__ import annotations

from pathlib import Path

import torch
from connito.moe.moments import Moments
from connito.v1 import cycle_pb2
from connito.v1.run_pb2 import RunSpec, TrainPolicy

from services.trainer.training import Kept, last_call, schedule_of
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


def test_moments_go_from_a_cycle_to_the_next_one_and_only_there(tmp_path: Path) -> None:
    for cycle in (1, 2, 3):
        (tmp_path / str(cycle)).mkdir()
    assert Kept(tmp_path / "1").load(second_only=True) == Moments(second_only=True), "nothing was kept yet"
    one = torch.ones(2, 2)
    Kept(tmp_path / "1").save(Moments(4, {"layers.0.down_proj": one}, {"layers.0.down_proj": 2 * one}))
    kept = Kept(tmp_path / "2").load(second_only=False)
    assert (kept.steps, kept.second_only) == (4, False)
    assert torch.equal(kept.second["layers.0.down_proj"], 2 * one)
    assert Kept(tmp_path / "2").load(second_only=True).second_only
    assert Kept(tmp_path / "3").load(second_only=True).steps == 0, "cycle 2 left nothing"
    (tmp_path / "2" / Kept.NAME).write_bytes(b"torn by a power cut")
    assert Kept(tmp_path / "3").load(second_only=True).steps == 0


def test_a_policy_without_a_schedule_keeps_its_rate() -> None:
    plain = schedule_of(RunSpec(cycles=3, training=TrainPolicy(local_steps=5)))
    assert {plain.factor(cycle, step) for cycle in (1, 2, 3) for step in range(5)} == {1.0}
    falling = schedule_of(RunSpec(cycles=3, training=TrainPolicy(local_steps=5, final_rate_share=0.1, warmup_steps=1)))
    assert falling.factor(1, 0) == 0.5
    assert falling.factor(3, 4) < 0.12
