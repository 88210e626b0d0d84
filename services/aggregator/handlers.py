"""Actions of the aggregator in a run, as a pure function of the run's facts."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from connito.library.deposit_plan import lacks_scores
from connito.library.scores import benchmark_key
from connito.protocol.rules import readable
from connito.service.engine import Action, Decision
from connito.v1 import cycle_pb2
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts

STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "VALIDATE", "MERGE", "LIBRARY")


@dataclass(frozen=True)
class Preload:
    """Load the base model and measure the current state, so that the first merge does not wait for it."""

    run: str


@dataclass(frozen=True)
class Merge:
    """Score and merge one cycle."""

    run: str
    cycle: int


@dataclass(frozen=True)
class Benchmark:
    """Score base and result of an ended run on what it names to be scored on."""

    run: str


def decide(facts: RunFacts, loaded: Container[str]) -> Decision:
    """Decide which actions are missing. `loaded` are the runs whose model is in memory; nothing here waits for a time.

    VALIDATE is read in order and its `closed` is written behind everything it includes; so with it, every report that
    counts is known. `submit.settled` comes on another stream and is waited for by name.
    """
    if facts.ended is not None:
        due = lacks_scores(facts)
        return Decision([Action(benchmark_key(facts.run), facts.run, Benchmark(facts.run))] if due else [], None)
    if facts.selection is None:
        return Decision([], None)
    actions = [] if facts.run in loaded else [Action(f"{facts.run}/preload", facts.run, Preload(facts.run))]
    for cycle in facts.recent:
        ready = (
            facts.window("validate", cycle).closed is not None
            and facts.window("merge", cycle).opened is not None
            and facts.window("submit", cycle).settled is not None
            and _judged_by_rules(facts, cycle)
        )
        if ready and facts.version(cycle) is None:
            actions.append(Action(f"{facts.run}/merge/{cycle}", facts.run, Merge(facts.run, cycle)))
            break
    return Decision(actions, None)


def _judged_by_rules(facts: RunFacts, cycle: int) -> bool:
    """Return whether everything is known that the rules of draw, quorum and closing look at."""
    return readable(facts, cycle) and all(window.closed is not None for window in facts.windows(cycle)[:-1])


def drop_losses(facts: RunFacts, fact: Fact) -> None:
    """Forget the losses of a cycle whose version is out: copies are found by them, and they would be most of the memory.

    `fact` has just arrived. Streams are read side by side, so a report may come after the version.
    """
    if isinstance(fact.message, (cycle_pb2.VersionPublished, cycle_pb2.ScoreReport)) and facts.version(fact.key.cycle):
        for report in facts.reports(fact.key.cycle).values():
            for score in report.message.scores:
                score.ClearField("losses")
