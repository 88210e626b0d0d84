"""Decide the next step of a run: one pure function of its facts and the time.

    created -> selected -> [ train -> commit -> submit -> validate -> merge ] x cycles -> ended

`decide` looks at the set of facts, never at what arrived last, and returns the one thing that is missing or the time
at which to look again. Evaluating it twice, on another replica or after a crash, gives the same answer, and the broker
admits each fact once. Streams are read side by side; on facts that are incomplete it may wait, but never takes somebody
for having acted who has not.
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.protocol import progress, rules
from connito.protocol.beacon import draw_seed
from connito.protocol.objective import reached
from connito.protocol.quorum import present
from connito.render.formats import count
from connito.service.engine import Action, Decision
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views.empty_handed import why_nothing
from connito.views.sentences import sentence
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.subjects import window_value
from connito.wire.window import Window
from google.protobuf.message import Message

from . import expected
from .deadlines import deadline_ms

# The stream whose messages the close of a window includes or leaves out.
STREAMS = {"train": "INGRESS", "commit": "INGRESS", "submit": "INGRESS", "validate": "VALIDATE", "merge": "MERGE"}
# Windows whose content the committer settles after the close.
_SETTLED = ("commit", "submit")


@dataclass(frozen=True)
class PublishFact:
    """Write one fact."""

    section: str
    cycle: int
    kind: str
    message: Message
    id: str = ""


@dataclass(frozen=True)
class WriteHead:
    """Sign the log as it is when this is performed."""

    number: int


@dataclass(frozen=True)
class CloseWindow:
    """Close a window at the last sequence of `stream` that was read when this is performed."""

    window: str
    cycle: int
    stream: str
    cause: cycle_pb2.CloseCause.ValueType


def decide(facts: RunFacts, now_ms: int, stake: rules.Stake) -> Decision:
    """Return the next step of a run, or the time at which one may become due: Unix milliseconds of the broker's clock."""
    spec, selected = facts.spec, facts.selected_fact
    if spec is None:
        return Decision([])
    if facts.ended is not None:
        return _seal(facts)
    if uncounted := [key for key in facts.joined if facts.stake(key) is None]:
        return Decision([_count(facts.run, key, stake(key)) for key in uncounted])
    if rules.objectors(facts, facts.cycle, stake):
        first = min(facts.objections(facts.cycle).values(), key=lambda fact: fact.sequence)
        detail = f"validators object to cycle {facts.cycle}: {sentence(first.message.finding)}; audit the run"
        return _end(facts, run_pb2.RUN_OUTCOME_FAILED, reasons_pb2.REASON_RULE_BROKEN, detail)
    failed = facts.selection_failed
    if failed is not None:
        reason = failed.reason or reasons_pb2.REASON_SELECTION_FAILED
        return _end(facts, run_pb2.RUN_OUTCOME_FAILED, reason, failed.detail)
    if selected is None:
        return Decision([])
    return _cycle(facts, spec, now_ms, stake) if facts.cycle else _assemble(facts, spec, selected, now_ms, stake)


def _count(run: str, validator: str, stake: float) -> Action:
    """Write down what a vote weighs before it is cast: a roster that changes later changes no judge of this run."""
    message = run_pb2.StakeCounted(run=run, validator=validator, stake=stake)
    return Action(f"{run}/run.0.stake.{validator}", run, PublishFact("run", 0, "stake", message, validator))


def _assemble(facts: RunFacts, spec: run_pb2.RunSpec, selected: Fact, now_ms: int, stake: rules.Stake) -> Decision:
    policy, miners, validators = spec.windows, len(expected.active(facts)), len(facts.validators)
    if miners >= policy.min_miners and validators >= policy.min_validators:
        return _open(facts, spec, facts.next_train, now_ms, stake)
    deadline = selected.time_unix_ms + round(policy.assemble_seconds * 1000)
    if now_ms < deadline:
        return Decision([], deadline)
    few_miners = miners < policy.min_miners
    return _end(
        facts,
        run_pb2.RUN_OUTCOME_FAILED,
        reasons_pb2.REASON_TOO_FEW_MINERS if few_miners else reasons_pb2.REASON_NO_QUORUM,
        f"{policy.assemble_seconds:g} s after the selection there were {miners} of {count(policy.min_miners, 'miner')} and "
        f"{validators} of {count(policy.min_validators, 'validator')}; start more, or submit the job again with a smaller "
        "minimum or a longer assemble_seconds",
    )


def _seal(facts: RunFacts) -> Decision:
    """Write a head behind the end of a run, and another one behind its deposit."""
    ended, last = facts.ended_fact, facts.head(facts.next_head - 1)
    if ended is None:
        return Decision([])
    covered = {} if last is None else {cut.stream: cut.last_sequence for cut in last.message.cuts}
    deposited = max((fact.sequence for fact in facts.deposits.values()), default=0)
    open_end = covered.get("RUNS", 0) < ended.sequence or covered.get("LIBRARY", 0) < deposited
    return _head(facts, facts.next_head) if open_end else Decision([])


def _head(facts: RunFacts, number: int) -> Decision:
    return Decision([Action(f"{facts.run}/run.{number}.head", facts.run, WriteHead(number))])


def _cycle(facts: RunFacts, spec: run_pb2.RunSpec, now_ms: int, stake: rules.Stake) -> Decision:
    for window in facts.windows(facts.cycle):
        if window.opened_fact is None:
            return _open(facts, spec, window, now_ms, stake)
        if window.closed_fact is None:
            return _in_window(facts, window, now_ms, stake)
        if window.name in _SETTLED and window.settled is None:
            return Decision([])
    enough = reached(facts, facts.cycle)
    if enough is None and facts.cycle < spec.cycles and not progress.hopeless(facts):
        return _open(facts, spec, facts.next_train, now_ms, stake)
    if not progress.merged_anything(facts):
        reason = reasons_pb2.REASON_NO_IMPROVEMENT
        return _end(facts, run_pb2.RUN_OUTCOME_NO_IMPROVEMENT, reason, why_nothing(facts))
    detail = sentence(enough) if enough is not None else f"{spec.cycles} of {count(spec.cycles, 'cycle')} done"
    return _end(facts, run_pb2.RUN_OUTCOME_COMPLETED, reasons_pb2.REASON_UNSPECIFIED, detail)


def _in_window(facts: RunFacts, window: Window, now_ms: int, stake: rules.Stake) -> Decision:
    """Close an open window once everybody has acted or its deadline is over."""
    deadline = rules.deadline_ms(facts, window)
    if window.name == "validate":
        drawn = window.drawn_fact
        if drawn is None:
            return _draw(facts, window, now_ms, stake)
        waiting = bool(expected.unreported(facts, drawn.message))
    else:
        waiting = expected.waiting(facts, window)
    if waiting and window.name == "merge":
        # No deadline: an aggregator that is away is restarted, and its work cannot be done by anyone else.
        return Decision([])
    if waiting and now_ms < deadline:
        return Decision([], _look(window, now_ms, deadline))
    if window.name == "train" and not present(facts, window.cycle, stake).enough:
        # A cycle that cannot be used is not begun. Whoever comes is a fact; at the deadline the run counts as paused.
        return Decision([], deadline if now_ms < deadline else None)
    return _close(window, cycle_pb2.CLOSE_CAUSE_DEADLINE if waiting else cycle_pb2.CLOSE_CAUSE_ALL_ACTED)


def _draw(facts: RunFacts, window: Window, now_ms: int, stake: rules.Stake) -> Decision:
    """Draw the seed, wait for reveals, or give the cycle up for lack of a quorum."""
    cycle, half, deadline = window.cycle, rules.half_time_ms(window), rules.deadline_ms(facts, window)
    secrets, possible = rules.secrets(facts, window), rules.still_drawing(facts, window)
    if rules.quorum_of_draw(facts, cycle, secrets, stake) and (len(secrets) == len(possible) or now_ms >= half):
        omitted = sorted(key for key in window.expected if key not in secrets)
        message = cycle_pb2.SeedDrawn(
            run=facts.run,
            cycle=cycle,
            seed=draw_seed(facts.run, cycle, secrets),
            validators=sorted(secrets),
            omitted=omitted,
            last_sequence=max(fact.sequence for fact in facts.seed_reveals(cycle).values()),
        )
        return _publish(facts, "validate", cycle, "drawn", message)
    if not rules.quorum_of_draw(facts, cycle, possible, stake):
        # Nobody else can join this draw, so waiting for the deadline would change nothing.
        return _close(window, cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    if now_ms >= deadline:
        return _close(window, cycle_pb2.CLOSE_CAUSE_DEADLINE)
    return Decision([], half if now_ms < half else _look(window, now_ms, deadline))


def _look(window: Window, now_ms: int, deadline: int) -> int:
    """Return when to look again at a window that stays open: also when it begins to count as paused."""
    return min(window.deadline_unix_ms, deadline) if now_ms < window.deadline_unix_ms else deadline


def _open(facts: RunFacts, spec: run_pb2.RunSpec, window: Window, now_ms: int, stake: rules.Stake) -> Decision:
    if window.name == "train" and facts.head(window.cycle) is None:
        return _head(facts, window.cycle)
    version, state = window.start
    message = cycle_pb2.WindowOpened(
        run=facts.run,
        cycle=window.cycle,
        window=window_value(window.name),
        deadline_unix_ms=0 if window.name == "merge" else deadline_ms(facts, window, now_ms, spec.windows),
        expected=expected.named(facts, window, stake),
        version=version,
        state=state,
    )
    return _publish(facts, window.name, window.cycle, "opened", message)


def _end(
    facts: RunFacts, outcome: run_pb2.RunOutcome.ValueType, reason: reasons_pb2.Reason.ValueType, detail: str
) -> Decision:
    last = facts.latest_version
    message = run_pb2.RunEnded(
        run=facts.run, outcome=outcome, reason=reason, detail=detail, final_version=0 if last is None else last.version
    )
    return _publish(facts, "run", 0, "ended", message)


def _publish(
    facts: RunFacts,
    section: str,
    cycle: int,
    kind: str,
    message: cycle_pb2.WindowOpened | cycle_pb2.SeedDrawn | run_pb2.RunEnded,
) -> Decision:
    key = f"{facts.run}/{section}.{cycle}.{kind}"
    return Decision([Action(key, facts.run, PublishFact(section, cycle, kind, message))])


def _close(window: Window, cause: cycle_pb2.CloseCause.ValueType) -> Decision:
    action = CloseWindow(window.name, window.cycle, STREAMS[window.name], cause)
    return Decision([Action(f"{window.facts.run}/{window.name}.{window.cycle}.closed", window.facts.run, action)])
