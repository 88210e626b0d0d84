"""Whatever the order of facts and wherever the process is killed, a miner keeps its word.

A miner is driven by `decide` against a small world that answers like the committer. Every action may be cut short
before its effect, between its effect and the mark in the work folder, or not at all; facts arrive in any order that
streams allow, some of them late.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from services.trainer.handlers import Commit, LogDecision, ReportTrained, Reveal, Train, decide
from services.trainer.state import CycleProgress
from services.trainer.strategy import HONEST, Strategy
from tests.support.run import ME, Run

CYCLES = 2
BEFORE, BETWEEN, DONE = range(3)


@dataclass
class Miner:
    """A work folder in memory, and everything that was said in public."""

    story: Run
    progress: dict[int, CycleProgress] = field(default_factory=dict)
    commitments: dict[int, set[str]] = field(default_factory=dict)
    reveals: list[int] = field(default_factory=list)
    trained: int = 0

    def mine(self, cycle: int) -> CycleProgress:
        return self.progress.get(cycle, CycleProgress(cycle, ME))

    def mark(self, cycle: int, crash: int, **changes: object) -> None:
        if crash == DONE:
            self.progress[cycle] = replace(self.mine(cycle), **changes)  # type: ignore[arg-type]

    def perform(self, step: object, crash: int) -> None:
        facts = self.story.facts
        if crash == BEFORE or isinstance(step, LogDecision):
            return
        match step:
            case Train(cycle):
                assert not facts.window("commit", cycle).closed
                assert cycle not in self.commitments, "made another result after committing to one"
                self.trained += 1
                self.mark(cycle, crash, artifact=f"{self.trained:02x}", commitment=f"{self.trained:02x}" * 32)
            case ReportTrained(cycle):
                self.mark(cycle, crash, said=True)
            case Commit(cycle):
                assert facts.window("commit", cycle).opened
                self.commitments.setdefault(cycle, set()).add(self.mine(cycle).commitment)
                self.mark(cycle, crash, committed=True)
            case Reveal(cycle):
                accepted = facts.commitments(cycle).get(ME)
                assert accepted is not None, "revealed before its commitment was accepted"
                assert accepted.message.digest.hex() == self.mine(cycle).commitment
                assert facts.window("submit", cycle).opened, "revealed before the submit window opened"
                assert ME in facts.window("commit", cycle).require_settled().committed
                self.reveals.append(cycle)
                self.mark(cycle, crash, revealed=True)


def world(miner: Miner, cycle: int) -> list[Callable[[], object]]:
    """The facts of a cycle, each callable when its turn has come. The committer accepts the first commitment it saw."""
    story = miner.story

    def answer() -> None:
        said = miner.commitments.get(cycle)
        if said:
            story.committed(ME, cycle, bytes.fromhex(min(said)))

    def settle() -> None:
        story.settled("commit", cycle, committed=[ME] if ME in story.facts.commitments(cycle) else [])

    return [
        lambda: story.opened("train", cycle),
        lambda: story.closed("train", cycle),
        lambda: story.opened("commit", cycle),
        answer,
        lambda: story.closed("commit", cycle),
        settle,
        lambda: story.opened("submit", cycle),
        lambda: story.closed("submit", cycle),
    ]


moves = st.lists(st.tuples(st.integers(0, 3), st.sampled_from([BEFORE, BETWEEN, DONE])), min_size=20, max_size=80)


class _Hasty(Strategy):
    """Whatever a strategy's own timing allows, what the protocol needs is checked outside of it."""

    def may_produce(self, facts: Any, cycle: int) -> bool:
        return True

    def may_reveal(self, facts: Any, cycle: int) -> bool:
        return facts.window("submit", cycle).opened is not None


@settings(deadline=None, max_examples=200)
@given(moves=moves, strategy=st.sampled_from([HONEST, _Hasty()]))
def test_never_commits_to_two_results_nor_reveals_early(moves: list[tuple[int, int]], strategy: Strategy) -> None:
    story = _story()
    miner = Miner(story)
    script = [turn for cycle in range(1, CYCLES + 1) for turn in world(miner, cycle)]
    for advance, crash in moves:
        decision = decide(story.facts, ME, miner.progress, strategy)
        for action in decision.actions:
            miner.perform(action.payload, crash)
        for turn in script[:advance]:
            turn()
        del script[:advance]
    for cycle, digests in miner.commitments.items():
        assert len(digests) == 1, f"two commitments in cycle {cycle}"
    assert set(miner.reveals) <= set(miner.commitments)


@settings(deadline=None, max_examples=50)
@given(crashes=st.lists(st.sampled_from([BEFORE, BETWEEN, DONE]), max_size=30), pause=st.integers(8, 12))
def test_with_time_enough_every_cycle_is_revealed_in_spite_of_crashes(crashes: list[int], pause: int) -> None:
    story = _story()
    miner = Miner(story)
    outcomes = iter(crashes)
    for cycle in range(1, CYCLES + 1):
        for turn in world(miner, cycle):
            for _ in range(pause):
                for action in decide(story.facts, ME, miner.progress).actions:
                    miner.perform(action.payload, next(outcomes, DONE))
            turn()
        for _ in range(len(crashes) + pause):
            for action in decide(story.facts, ME, miner.progress).actions:
                miner.perform(action.payload, next(outcomes, DONE))
    committed = {c for c in miner.commitments if ME in story.facts.commitments(c)}
    assert committed <= set(miner.reveals)
    if len(crashes) < pause:
        assert committed == set(range(1, CYCLES + 1))


@settings(deadline=None, max_examples=100)
@given(order=st.permutations(range(8)))
def test_the_order_in_which_streams_are_read_does_not_matter(order: list[int]) -> None:
    """All facts of a cycle that was committed to: in any order of arrival the miner ends at the same decision."""
    mine = CycleProgress(1, ME, artifact="01", commitment="01" * 32, said=True, committed=True)
    story = _story()
    turns = [
        lambda: story.opened("train"),
        lambda: story.closed("train"),
        lambda: story.opened("commit"),
        lambda: story.committed(ME, digest=bytes.fromhex("01" * 32)),
        lambda: story.closed("commit"),
        lambda: story.settled("commit", committed=[ME]),
        lambda: story.opened("submit"),
        lambda: story.submitted(ME),
    ]
    for position, index in enumerate(order):
        turns[index]()
        got = [a.payload for a in decide(story.facts, ME, {1: mine}).actions if not isinstance(a.payload, LogDecision)]
        known = set(order[: position + 1])
        ready = {0, 3, 5, 6} <= known and 7 not in known
        assert got == ([Reveal(1)] if ready else [])


def _story() -> Run:
    return Run().created().selected().miners(ME)
