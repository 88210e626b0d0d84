"""Checks of the order of a run's windows and versions. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator

from connito.audit.differences import Difference, Step
from connito.audit.evidence import Evidence
from connito.protocol import progress
from connito.protocol.bans import banned
from connito.protocol.objective import reached
from connito.render import formats
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.enums import name_of
from connito.wire.facts import RunFacts
from connito.wire.identity import short_key
from connito.wire.subjects import WINDOWS, window_value

# Where the messages lie that a window's close includes or leaves out.
CLOSES = {"train": "INGRESS", "commit": "INGRESS", "submit": "INGRESS", "validate": "VALIDATE", "merge": "MERGE"}
_SETTLED = ("commit", "submit")
# Broker times of different streams may come from different machines.
CLOCK_TOLERANCE_MS = 1000
LOSS_TOLERANCE = 1e-6


def finished(facts: RunFacts, cycle: int) -> bool:
    """Return whether a cycle has its outcome in the log, so that everything before it has to be there too."""
    return facts.version(cycle) is not None


def windows(evidence: Evidence, cycle: int) -> Step:
    """Check the windows of a cycle: opened, closed and settled in order, each from the end of the one before."""
    differences = [
        *_published(evidence, cycle),
        *_opening(evidence, cycle),
        *_sequence(evidence, cycle),
        *_participants(evidence, cycle),
    ]
    return Step("windows", cycle, 2 * len(WINDOWS) + len(_SETTLED), tuple(differences))


def _wrong(where: str, what: str, cycle: int) -> Difference:
    return Difference("windows", where, what, cycle)


def _published(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    """Yield faults of cycles that opened, or merges that closed, before the version was published."""
    facts = evidence.facts
    for due, needed in ((cycle > 1, cycle - 1), (facts.window("merge", cycle).closed is not None, cycle)):
        if due and facts.version(needed) is None:
            where = evidence.subject("merge", needed, "version")
            yield _wrong(where, "is not in the log, but what follows it is", cycle)


def _opening(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    facts = evidence.facts
    version, state = start_of(facts, cycle)
    for window in WINDOWS:
        where = evidence.subject(window, cycle, "opened")
        opened = facts.window(window, cycle).opened
        if opened is None:
            continue
        if opened.window != window_value(window):
            yield _wrong(where, f"opens {name_of(cycle_pb2.Window, opened.window)}", cycle)
        if opened.version != version:
            yield _wrong(where, f"starts from version {opened.version}; the one before is {version}", cycle)
        if state is not None and opened.state.digest != state.digest:
            what = f"starts from state {opened.state.digest[:12]}…; the version before is {state.digest[:12]}…"
            yield _wrong(where, what, cycle)


def start_of(facts: RunFacts, cycle: int) -> tuple[int, ArtifactRef | None]:
    """Return the version a cycle has to start from and its state, None when nobody said which that is."""
    before = facts.version(cycle - 1)
    if before is not None:
        return before.version, before.state
    if cycle == 1 and facts.selection is not None:
        return 0, facts.selection.initial_state
    opened = facts.window("train", cycle).opened
    return (0 if opened is None else opened.version), None


def _sequence(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    """Yield faults in the order of windows, and in the stream and sequence that a close names."""
    facts, previous, last = evidence.facts, 0, 0
    for window in WINDOWS:
        for kind in ("opened", "closed", *(("settled",) if window in _SETTLED else ())):
            where = evidence.subject(window, cycle, kind)
            fact = facts.fact(window, cycle, kind)
            if fact is None:
                # The merge is closed after its version is out, which is how far a cycle has to have come.
                if finished(facts, cycle) and (window, kind) != ("merge", "closed"):
                    yield _wrong(where, "is not in the log, but the cycle has a version", cycle)
                continue
            if fact.time_unix_ms + CLOCK_TOLERANCE_MS < previous and not clock_was_set_back(facts, cycle):
                yield _wrong(where, "was written before what it follows", cycle)
            previous = max(previous, fact.time_unix_ms)
        closed, fact = facts.window(window, cycle).closed, facts.window(window, cycle).closed_fact
        if closed is None or fact is None:
            continue
        where = evidence.subject(window, cycle, "closed")
        if closed.window != window_value(window) or closed.stream != CLOSES[window]:
            yield _wrong(where, f"closes {closed.stream}, not {CLOSES[window]}", cycle)
        if closed.stream == fact.stream and closed.last_sequence >= fact.sequence:
            yield _wrong(where, f"includes up to {closed.last_sequence}, beyond itself", cycle)
        if closed.stream == "INGRESS":
            if closed.last_sequence < last:
                yield _wrong(where, f"ends at {closed.last_sequence}, before {last}", cycle)
            last = max(last, closed.last_sequence)
        if closed.runs_sequence and list(closed.banned) != sorted(banned(facts, closed.runs_sequence)):
            what = f"names {len(closed.banned)} banned miners; the bans up to RUNS {closed.runs_sequence} are others"
            yield _wrong(where, what, cycle)
        if closed.banned and not closed.runs_sequence:
            yield _wrong(where, "names banned miners, but not up to where bans count", cycle)
        settled = facts.window(window, cycle).settled
        if settled is not None and settled.last_sequence != closed.last_sequence:
            where = evidence.subject(window, cycle, "settled")
            what = f"settles up to {settled.last_sequence}; the window ended at {closed.last_sequence}"
            yield _wrong(where, what, cycle)


def clock_was_set_back(facts: RunFacts, cycle: int) -> bool:
    """Return whether a stream of a cycle, or of the one before, holds an earlier time behind a later one. The broker's clock was
    set back then, and times tell no order of streams.
    """
    latest: dict[str, int] = {}
    for fact in sorted(facts.facts.values(), key=lambda fact: fact.sequence):
        if fact.key.cycle in (cycle - 1, cycle) and fact.key.section != "run":
            if fact.time_unix_ms + CLOCK_TOLERANCE_MS < latest.get(fact.stream, 0):
                return True
            latest[fact.stream] = max(latest.get(fact.stream, 0), fact.time_unix_ms)
    return False


def _participants(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    facts = evidence.facts
    known = {*facts.miners, *facts.validators}
    for window in WINDOWS:
        opened = facts.window(window, cycle).opened
        strangers = sorted(set(opened.expected) - known) if opened is not None else []
        if strangers:
            what = f"expects {short_key(strangers[0])}, who neither enrolled nor joined"
            yield _wrong(evidence.subject(window, cycle, "opened"), what, cycle)


def versions(evidence: Evidence, cycle: int) -> Step:
    """Check that the version of a cycle is the child of the one before and compares with that one's losses."""
    found = tuple(_version(evidence, cycle))
    return Step("versions", cycle, 1 if finished(evidence.facts, cycle) else 0, found)


def _version(evidence: Evidence, cycle: int) -> Iterator[Difference]:
    facts, where = evidence.facts, evidence.subject("merge", cycle, "version")
    version, opened, before = facts.version(cycle), facts.window("train", cycle).opened, facts.version(cycle - 1)
    if version is None or opened is None:
        return

    def wrong(what: str) -> Difference:
        return Difference("versions", where, what, cycle)

    if (version.parent, version.version) != (opened.version, opened.version + 1):
        yield wrong(f"is version {version.version} of {version.parent}; the cycle started from {opened.version}")
    unmoved = version.gate in (cycle_pb2.GATE_DECISION_KEPT_INCUMBENT, cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE)
    if unmoved and version.state.digest != opened.state.digest:
        yield wrong("keeps the incumbent, but names another state")
    if unmoved and before is not None and version.outer_state.digest != before.outer_state.digest:
        yield wrong("keeps the incumbent, but names another outer state")
    if unmoved == bool(version.merged) or len(version.merged) != len(version.weights):
        names = name_of(cycle_pb2.GateDecision, version.gate)
        yield wrong(f"{names} with {len(version.merged)} merged and {formats.count(len(version.weights), 'weight')}")
    if before is not None:
        left = {("", loss.domain): (loss.after, loss.tokens) for loss in before.losses}
        left |= {("gate ", loss.domain): (loss.after, loss.tokens) for loss in before.gate_losses}
        # Where nothing was tried, the gate measured nothing.
        gated = version.gate_losses if before.gate_losses else ()
        for part, loss in (*(("", loss) for loss in version.losses), *(("gate ", loss) for loss in gated)):
            was, tokens = left.get((part, loss.domain), (math.nan, 0))
            # Another machine may have measured the same state in between.
            if tokens != loss.tokens or not math.isclose(was, loss.before, rel_tol=LOSS_TOLERANCE):
                yield wrong(f"{part}losses of {loss.domain} begin at {loss.before!r}; the version before left {was!r}")


def ending(evidence: Evidence) -> Step:
    """Check that the run's ending follows from its progress."""
    facts, ended = evidence.facts, evidence.facts.ended
    if ended is None or facts.spec is None:
        return Step("ending", 0, 0, note="the run has not ended")
    done = [version.version for version in facts.versions.values()]
    found = []
    if ended.final_version != (done[-1] if done else 0):
        what = f"final version {ended.final_version}; the last one published is {done[-1] if done else 0}"
        found.append(Difference("ending", "run.0.ended", what))
    enough = len(done) == facts.spec.cycles or (bool(done) and reached(facts, len(done)) is not None)
    completed = ended.outcome == run_pb2.RUN_OUTCOME_COMPLETED
    empty = ended.outcome == run_pb2.RUN_OUTCOME_NO_IMPROVEMENT
    if (completed and not enough) or (empty and not enough and not progress.hopeless(facts)):
        what = f"ended after {len(done)} of {formats.count(facts.spec.cycles, 'cycle')}"
        found.append(Difference("ending", "run.0.ended", what))
    if (completed or empty) and empty == progress.merged_anything(facts):
        what = (
            "says that nothing was improved, and work was merged" if empty else "says completed, and nothing was merged"
        )
        found.append(Difference("ending", "run.0.ended", what))
    return Step("ending", 0, 1, tuple(found))
