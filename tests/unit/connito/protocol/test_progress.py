"""A run adapts its training to cycles in which nobody was useful, and knows when to give up."""

from __future__ import annotations

import pytest
from connito.protocol import progress
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views.empty_handed import why_nothing

from services.coordinator import handlers
from tests.support.run import Run, even, ref

BROKEN, COPY = reasons_pb2.REASON_RETENTION_BROKEN, reasons_pb2.REASON_COPY
TRAINING = run_pb2.TrainPolicy(learning_rate=0.008, replay_share=0.2, local_steps=1, batch_sequences=1)


def run_of(*cycles: reasons_pb2.Reason.ValueType | None, of: int = 6, replay: float = 0.2, text: bool = True) -> Run:
    """A run whose cycles each refused their one submission for a reason; None is a cycle that merged it."""
    training = run_pb2.TrainPolicy()
    training.CopyFrom(TRAINING)
    training.replay_share = replay
    brought = run_pb2.CorpusRef(domain="general", artifact=ref("a" * 64)) if text else None
    run = Run().created(cycles=of, training=training, replay=brought).selected().miners("UA").validators("UV")
    for cycle, reason in enumerate(cycles, start=1):
        run.opened("train", cycle)
        for window in ("train", "commit", "submit", "validate", "merge"):
            if window != "train":
                run.opened(window, cycle)
            run.closed(window, cycle)
            if window in ("commit", "submit"):
                run.settled(window, cycle, committed=[])
        verdict = cycle_pb2.Verdict(miner="UA", reason=reason or reasons_pb2.REASON_UNSPECIFIED)
        run.scored(verdict, cycle=cycle)
        run.merged(cycle, merged=[] if reason else ["UA"])
    return run


def test_the_rate_falls_and_the_replay_rises_with_each_barren_cycle_in_a_row() -> None:
    run = run_of(BROKEN, BROKEN)
    found = [progress.training(run.facts, cycle) for cycle in (1, 2, 3)]
    assert [policy.learning_rate for policy in found] == [0.008, 0.004, 0.002]
    assert [policy.replay_share for policy in found] == [0.2, 0.4, 0.5]


def test_a_useful_cycle_brings_the_settings_back() -> None:
    assert progress.training(run_of(BROKEN, None).facts, 3) == TRAINING


def test_without_replay_text_there_is_no_replay_to_raise() -> None:
    assert progress.training(run_of(BROKEN, text=False).facts, 2).replay_share == 0.2
    assert progress.training(run_of(BROKEN, replay=0.0, text=False).facts, 2).replay_share == 0


def test_a_run_without_replay_takes_it_up_where_it_has_text_for_it() -> None:
    run = run_of(BROKEN, BROKEN, replay=0.0)
    assert [progress.training(run.facts, cycle).replay_share for cycle in (1, 2, 3)] == [0, 0.125, 0.25]


def test_other_reasons_adapt_nothing() -> None:
    facts = run_of(COPY, COPY, COPY).facts
    assert progress.training(facts, 4) == TRAINING
    assert not progress.hopeless(facts)


@pytest.mark.parametrize(
    ("cycles", "hopeless"),
    [
        ((BROKEN, BROKEN), False),
        ((BROKEN,) * 3, True),
        ((None, BROKEN, BROKEN, BROKEN), False),
        ((COPY, BROKEN, BROKEN), False),
    ],
)
def test_a_run_is_hopeless_after_three_barren_cycles_and_nothing_merged(
    cycles: tuple[reasons_pb2.Reason.ValueType | None, ...], *, hopeless: bool
) -> None:
    assert progress.hopeless(run_of(*cycles).facts) is hopeless


def ending(run: Run) -> run_pb2.RunEnded:
    (action,) = handlers.decide(run.facts, run.now, even).actions
    assert isinstance(action.payload, handlers.PublishFact)
    message = action.payload.message
    assert isinstance(message, run_pb2.RunEnded), message
    return message


def test_a_run_that_merged_nothing_is_not_called_completed() -> None:
    ended = ending(run_of(BROKEN, BROKEN, of=2))
    assert (ended.outcome, ended.reason) == (run_pb2.RUN_OUTCOME_NO_IMPROVEMENT, reasons_pb2.REASON_NO_IMPROVEMENT)
    assert "retention-broken 2" in ended.detail
    assert "replay" in ended.detail


def test_a_hopeless_run_ends_before_its_last_cycle() -> None:
    assert ending(run_of(BROKEN, BROKEN, BROKEN)).outcome == run_pb2.RUN_OUTCOME_NO_IMPROVEMENT


def test_a_run_that_merged_something_is_completed() -> None:
    assert ending(run_of(None, BROKEN, of=2)).outcome == run_pb2.RUN_OUTCOME_COMPLETED


def test_the_best_expert_of_the_shelf_is_named() -> None:
    run = run_of(BROKEN, of=1)
    rows = [
        run_pb2.StartCandidate(expert_id="a", measured=True, saved=0.2, low=0.1, high=0.3),
        run_pb2.StartCandidate(expert_id="b", measured=True, saved=0.7, low=0.6, high=0.8),
        run_pb2.StartCandidate(expert_id="unsure", measured=True, saved=0.9, low=-0.1, high=1.9),
        run_pb2.StartCandidate(expert_id="guessed", predicted=2.0),
    ]
    run.put("run", 0, "selected", run_pb2.SelectionMade(run=run.name, start=run_pb2.StartChoice(candidates=rows)))
    assert "`connito library export b --out expert`" in why_nothing(run.facts)
