"""Next actions of a miner: a pure function of the run's facts and of its own work folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from connito.protocol.bans import banned
from connito.service.engine import Action, Decision
from connito.v1 import cycle_pb2, reasons_pb2
from connito.views.sentences import detail_of
from connito.wire.enums import plain_name, reason_name
from connito.wire.facts import RunFacts

from .state import CycleProgress, Progress
from .strategy import HONEST, Strategy

STREAMS = ("RUNS", "TRAIN", "COMMIT", "SUBMIT", "MERGE")


@dataclass(frozen=True)
class Enrol:
    """Ask the coordinator to take part."""


@dataclass(frozen=True)
class Train:
    """Make the cycle's result and keep it in the work folder."""

    cycle: int


@dataclass(frozen=True)
class ReportTrained:
    """Tell everyone that the local steps are done; the result stays private."""

    cycle: int


@dataclass(frozen=True)
class Commit:
    """Publish the commitment to the kept result."""

    cycle: int


@dataclass(frozen=True)
class Reveal:
    """Upload the kept result and open the commitment."""

    cycle: int


@dataclass(frozen=True)
class KeepReceipt:
    """Keep the committer's newest receipt for what was said and has none."""


# A head follows the opening of its cycle at once; one that does not come for so long is missing.
HEAD_SECONDS, NO_HEAD = 30, "no-head"


@dataclass(frozen=True)
class LogDecision:
    """Log what was decided about this miner; `reason` when it was held against it. `name` is told once."""

    cycle: int
    name: str
    text: str
    reason: str = ""


Step = Train | ReportTrained | Commit | Reveal


def decide(facts: RunFacts, me: str, progress: Progress, strategy: Strategy = HONEST) -> Decision:
    """Return the next step of `me` in a run. `progress` is what its own work folder says; nothing here waits for a
    time.
    """
    if facts.spec is None:
        return Decision([], None)
    actions = [
        Action(f"{facts.run}/tell/{tell.cycle}/{tell.name}", facts.run, tell)
        for cycle in facts.recent
        for tell in news(facts, me, cycle)
        if tell.name not in _of(progress, me, cycle).told
    ]
    if _has_receipt(facts, progress):
        actions.append(Action(f"{facts.run}/receipt", facts.run, KeepReceipt()))
    if facts.ended is not None:
        return Decision(actions, None)
    if me in banned(facts):
        # What was decided is still told; work would be refused.
        return Decision(actions, None)
    if not facts.is_enrolled(me):
        return Decision([*actions, Action(f"{facts.run}/enrol", facts.run, Enrol())], None)
    for cycle in facts.recent:
        step = _next_step(facts, me, _of(progress, me, cycle), strategy)
        if step is not None:
            name = type(step).__name__.lower()
            actions.append(Action(f"{facts.run}/{cycle}/{name}", facts.run, step))
    return Decision(actions, None)


def without_head(facts: RunFacts, me: str, progress: Progress, now_ms: int) -> Decision:
    """Tell once that nothing can be trained since the head of the open cycle does not come; or when that is to be told."""
    window = facts.window("train", facts.cycle) if facts.cycle and facts.ended is None else None
    if window is None or window.opened_fact is None or not facts.is_enrolled(me) or me in banned(facts):
        return Decision()
    mine, late = _of(progress, me, facts.cycle), window.opened_fact.time_unix_ms + HEAD_SECONDS * 1000
    if facts.head(facts.cycle) is not None or mine.artifact or NO_HEAD in mine.told:
        return Decision()
    if now_ms < late:
        return Decision((), late)
    text = (
        f"waits: the coordinator has not signed yet where cycle {facts.cycle} begins, and this miner's text is drawn by that; "
        "it begins by itself when the signature comes"
    )
    tell = LogDecision(facts.cycle, NO_HEAD, text)
    return Decision([Action(f"{facts.run}/tell/{tell.cycle}/{tell.name}", facts.run, tell)])


def _has_receipt(facts: RunFacts, progress: Progress) -> bool:
    """Return whether there is a receipt for something that was said and has none here."""
    said = [sequence for mine in progress.values() for sequence in mine.unreceipted]
    receipt = facts.newest_receipt if said else None
    return receipt is not None and min(said) <= receipt.last_sequence


def _of(progress: Progress, me: str, cycle: int) -> CycleProgress:
    return progress.get(cycle, CycleProgress(cycle, me))


def _next_step(facts: RunFacts, me: str, mine: CycleProgress, strategy: Strategy) -> Step | None:
    """Return the one thing to do in a cycle. Each step needs what the step before left behind, so their order is
    fixed.
    """
    cycle = mine.cycle
    if not mine.said and strategy.may_say_trained(facts, cycle, has_result=bool(mine.artifact)):
        return ReportTrained(cycle)
    if not mine.artifact:
        return Train(cycle) if _wants_result(facts, me, cycle, strategy) else None
    if _may_commit(facts, me, mine):
        return Commit(cycle)
    if (
        not mine.revealed
        and stands(facts, me, mine)
        and not _answered(facts, me, cycle)
        and strategy.may_reveal(facts, cycle)
    ):
        return Reveal(cycle)
    return None


def _wants_result(facts: RunFacts, me: str, cycle: int, strategy: Strategy) -> bool:
    """Return whether a result can still be committed to and no other one has been."""
    return (
        cycle == facts.cycle
        and facts.selection is not None
        # What its text is drawn by, which stands in another stream than the opening.
        and facts.head(cycle) is not None
        and facts.window("commit", cycle).closed is None
        and facts.commitment(cycle, me) is None
        and strategy.may_produce(facts, cycle)
    )


def _may_commit(facts: RunFacts, me: str, mine: CycleProgress) -> bool:
    cycle = mine.cycle
    return (
        not mine.committed
        and facts.window("commit", cycle).opened is not None
        and facts.window("commit", cycle).closed is None
        and facts.commitment(cycle, me) is None
        and not refusals(facts, me, "commit", cycle)
    )


def stands(facts: RunFacts, me: str, mine: CycleProgress) -> bool:
    """Return whether the commitment that the committer settled on is the one to the result in the work folder."""
    settled = facts.window("commit", mine.cycle).settled
    accepted = facts.commitment(mine.cycle, me)
    return (
        settled is not None
        and me in settled.committed
        and accepted is not None
        and accepted.digest.hex() == mine.commitment
    )


def _answered(facts: RunFacts, me: str, cycle: int) -> bool:
    """Return whether a reveal of cycle `cycle` was accepted, there or in the next one, or refused.

    `not-revealed` is no answer to a reveal but the remark that none came: a late one is still welcome.
    """
    scoring = (facts.reveal(later, me) for later in (cycle, cycle + 1))
    accepted = any(reveal is not None and reveal.submission.origin_cycle == cycle for reveal in scoring)
    refused = refusals(facts, me, "submit", cycle).values()
    return accepted or any(refusal.reason != reasons_pb2.REASON_NOT_REVEALED for refusal in refused)


def refusals(facts: RunFacts, me: str, window: str, cycle: int) -> Mapping[str, cycle_pb2.Refused]:
    """Return the committer's refusals of this miner, by fact id."""
    return {f"{me}-{refusal.ingress_sequence}": refusal for refusal in facts.window(window, cycle).refusals(me)}


def news(facts: RunFacts, me: str, cycle: int) -> list[LogDecision]:
    """Return the decisions about `me` in a cycle, in plain words."""
    told = []
    for window, what in (("commit", "commitment"), ("submit", "reveal")):
        if facts.has(window, cycle, "accepted", me):
            told.append(LogDecision(cycle, f"{window}-accepted", f"{what} accepted"))
        for id_, refusal in refusals(facts, me, window, cycle).items():
            reason = reason_name(refusal.reason)
            name = f"{window}-refused-{id_.rpartition('-')[2]}"
            told.append(LogDecision(cycle, name, f"refused: {reason}: {detail_of(refusal)}", reason))
    scored = facts.scored(cycle)
    for verdict in scored.verdicts if scored is not None else ():
        if verdict.miner == me:
            refused = "" if verdict.reward else reason_name(verdict.reason)
            told.append(LogDecision(cycle, "verdict", describe(verdict), refused))
    return told


def describe(verdict: cycle_pb2.Verdict) -> str:
    """Return a verdict as one line: its reward, or the reason for none."""
    status = plain_name(cycle_pb2.VerdictStatus, verdict.status)
    if verdict.rank:
        why = f"; {detail}" if verdict.reason and (detail := detail_of(verdict)) else ""
        paid = f"rank {verdict.rank}, reward {verdict.reward}, utility {verdict.utility:.4f} nats per token"
        return f"{status}: {paid}{why}"
    return f"{status}: {reason_name(verdict.reason) or 'no rank'}: {detail_of(verdict)}"
