"""Next step of a run: a pure function of its facts and the time.

    created -> selected -> [ train -> commit -> submit -> validate -> merge ] x cycles -> ended

`decide` looks at the set of facts, never at what arrived last, and returns the one thing that is missing or the time
at which to look again. Evaluating it twice, on another replica or after a crash, gives the same answer, and the broker
admits each fact once. Streams are read side by side; on facts that are incomplete it may wait, but never takes somebody
for having acted who has not.
"""

from __future__ import annotations

from dataclasses import dataclass

from connito.protocol.beacon import draw_seed
from connito.protocol.objective import reached
from connito.service.engine import Action, Decision
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.sentences import sentence
from connito.wire.facts import RunFacts
from connito.wire.subjects import WINDOWS, window_value
from google.protobuf.message import Message

from . import expected
from .deadlines import deadline_ms

# Where the messages lie that a window's close includes or leaves out.
STREAMS = {"train": "INGRESS", "commit": "INGRESS", "submit": "INGRESS", "validate": "VALIDATE", "merge": "MERGE"}
# Windows after whose close the committer says what was inside.
_SETTLED = ("commit", "submit")


@dataclass(frozen=True)
class PublishFact:
    """Write one fact."""

    section: str
    cycle: int
    kind: str
    message: Message


@dataclass(frozen=True)
class CloseWindow:
    """Close a window at the last sequence that `stream` has when this is performed."""

    window: str
    cycle: int
    stream: str
    cause: cycle_pb2.CloseCause.ValueType


def decide(facts: RunFacts, now_ms: int) -> Decision:
    """Return the next step of a run, or the time (unix milliseconds) at which one may become due."""
    spec = facts.spec
    if spec is None or facts.ended is not None:
        return Decision([], None)
    failed = facts.selection_failed
    if failed is not None:
        reason = failed.reason or reasons_pb2.REASON_SELECTION_FAILED
        return _end(facts, run_pb2.RUN_OUTCOME_FAILED, reason, failed.detail)
    if facts.selection is None:
        return Decision([], None)
    if facts.cycle == 0:
        return _assemble(facts, spec, now_ms)
    return _cycle(facts, spec, facts.cycle, now_ms)


def _cycle(facts: RunFacts, spec: run_pb2.RunSpec, cycle: int, now_ms: int) -> Decision:
    for window in WINDOWS:
        if facts.window(window, cycle).opened is None:
            return _open(facts, spec, window, cycle, now_ms)
        if facts.window(window, cycle).closed is None:
            return _in_window(facts, spec, window, cycle, now_ms)
        if window in _SETTLED and facts.window(window, cycle).settled is None:
            return Decision([], None)
    enough = reached(facts, cycle)
    if enough is not None:
        return _end(facts, run_pb2.RUN_OUTCOME_COMPLETED, reasons_pb2.REASON_UNSPECIFIED, sentence(enough))
    if cycle < spec.cycles:
        return _open(facts, spec, "train", cycle + 1, now_ms)
    return _end(facts, run_pb2.RUN_OUTCOME_COMPLETED, reasons_pb2.REASON_UNSPECIFIED, f"all {spec.cycles} cycles done")


def _in_window(facts: RunFacts, spec: run_pb2.RunSpec, window: str, cycle: int, now_ms: int) -> Decision:
    if window == "validate":
        return _validate(facts, spec, cycle, now_ms)
    if window == "merge":
        # No deadline: an aggregator that is away is restarted, and its work cannot be done by anyone else.
        published = facts.version(cycle) is not None
        return _close(facts, window, cycle, cycle_pb2.CLOSE_CAUSE_ALL_ACTED) if published else Decision([], None)
    train = window == "train"
    waiting = expected.idle_in_train(facts, cycle) if train else expected.unanswered(facts, window, cycle)
    return _close_or_wait(facts, window, cycle, waiting, _opened(facts, window, cycle).deadline_unix_ms, now_ms)


def _assemble(facts: RunFacts, spec: run_pb2.RunSpec, now_ms: int) -> Decision:
    policy, miners, validators = spec.windows, len(expected.active(facts)), len(facts.validators)
    if miners >= policy.min_miners and validators >= policy.min_validators:
        return _open(facts, spec, "train", 1, now_ms)
    selected = facts.selected_fact
    assert selected is not None
    deadline = selected.time_unix_ms + round(policy.assemble_seconds * 1000)
    if now_ms < deadline:
        return Decision([], deadline)
    few_miners = miners < policy.min_miners
    return _end(
        facts,
        run_pb2.RUN_OUTCOME_FAILED,
        reasons_pb2.REASON_TOO_FEW_MINERS if few_miners else reasons_pb2.REASON_NO_QUORUM,
        f"{policy.assemble_seconds:g} s after the selection there were {miners} of {policy.min_miners} miners and "
        f"{validators} of {policy.min_validators} validators; start more, or submit the job again with a smaller "
        "minimum or a longer assemble_seconds",
    )


def _validate(facts: RunFacts, spec: run_pb2.RunSpec, cycle: int, now_ms: int) -> Decision:
    opened = facts.window("validate", cycle).opened_fact
    assert opened is not None
    deadline = _opened(facts, "validate", cycle).deadline_unix_ms
    half = max(0, deadline - opened.time_unix_ms) // 2
    drawn = facts.drawn_fact(cycle)
    if drawn is None:
        return _draw(facts, spec, cycle, opened.time_unix_ms + half, deadline, now_ms)
    waiting = [key for key in drawn.message.validators if key not in facts.reports(cycle)]
    # A draw that an outage delayed leaves as much time to score as one made in time.
    return _close_or_wait(facts, "validate", cycle, waiting, max(deadline, drawn.time_unix_ms + half), now_ms)


def _draw(
    facts: RunFacts, spec: run_pb2.RunSpec, cycle: int, half_time_ms: int, deadline: int, now_ms: int
) -> Decision:
    """Draw the seed, wait for reveals, or give the cycle up for lack of a quorum."""
    candidates, quorum = list(_opened(facts, "validate", cycle).expected), spec.windows.min_validators
    silent = expected.silent(facts, cycle, candidates)
    secrets = expected.secrets(facts, cycle, candidates)
    if len(secrets) >= quorum and (not silent or now_ms >= half_time_ms):
        seed = draw_seed(facts.run, cycle, secrets)
        omitted = [key for key in candidates if key not in secrets]
        message = cycle_pb2.SeedDrawn(
            run=facts.run, cycle=cycle, seed=seed, validators=sorted(secrets), omitted=sorted(omitted)
        )
        return _publish(facts, "validate", cycle, "drawn", message)
    if len(secrets) + len(silent) < quorum:
        # Nobody else can join this draw, so waiting for the deadline would change nothing.
        return _close(facts, "validate", cycle, cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    if now_ms >= deadline:
        return _close(facts, "validate", cycle, cycle_pb2.CLOSE_CAUSE_DEADLINE)
    return Decision([], half_time_ms if now_ms < half_time_ms else deadline)


def _close_or_wait(
    facts: RunFacts, window: str, cycle: int, waiting: list[str], deadline: int, now_ms: int
) -> Decision:
    if not waiting:
        return _close(facts, window, cycle, cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    if now_ms >= deadline:
        return _close(facts, window, cycle, cycle_pb2.CLOSE_CAUSE_DEADLINE)
    return Decision([], deadline)


def _open(facts: RunFacts, spec: run_pb2.RunSpec, window: str, cycle: int, now_ms: int) -> Decision:
    version, state = _start(facts, cycle)
    message = cycle_pb2.WindowOpened(
        run=facts.run,
        cycle=cycle,
        window=window_value(window),
        deadline_unix_ms=0 if window == "merge" else deadline_ms(facts, window, cycle, now_ms, spec.windows),
        expected=_people(facts, spec, window, cycle),
        version=version,
        state=state,
    )
    return _publish(facts, window, cycle, "opened", message)


def _people(facts: RunFacts, spec: run_pb2.RunSpec, window: str, cycle: int) -> list[str]:
    if window == "train":
        miners, validators = (
            expected.expected_miners(facts, cycle),
            expected.expected_validators(facts, spec, cycle),
        )
        return sorted({*miners, *validators})
    people = {"commit": expected.trained, "submit": expected.committed, "validate": expected.seeded}.get(window)
    return [] if people is None else people(facts, cycle)


def _start(facts: RunFacts, cycle: int) -> tuple[int, ArtifactRef]:
    """Return the model version a cycle starts from and its target-expert state θ_t."""
    published = facts.version(cycle - 1)
    if published is not None:
        return published.version, published.state
    opened, selection = facts.window("train", cycle).opened, facts.selection
    if opened is not None:
        return opened.version, opened.state
    assert cycle == 1, "a cycle after the first opens when the one before has published its version"
    assert selection is not None, "the first cycle opens after the selection"
    return 0, selection.initial_state


def _opened(facts: RunFacts, window: str, cycle: int) -> cycle_pb2.WindowOpened:
    opened = facts.window(window, cycle).opened
    assert opened is not None
    return opened


def _end(
    facts: RunFacts, outcome: run_pb2.RunOutcome.ValueType, reason: reasons_pb2.Reason.ValueType, detail: str
) -> Decision:
    last = facts.version(facts.cycle)
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
    return Decision([Action(key, facts.run, PublishFact(section, cycle, kind, message))], None)


def _close(facts: RunFacts, window: str, cycle: int, cause: cycle_pb2.CloseCause.ValueType) -> Decision:
    action = CloseWindow(window, cycle, STREAMS[window], cause)
    return Decision([Action(f"{facts.run}/{window}.{cycle}.closed", facts.run, action)], None)
