"""What must hold of a run whatever went wrong: nothing lost, nothing twice, everything as the audit computes it again."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from connito.audit.artifacts import gather
from connito.audit.audit import Options, audit
from connito.audit.evidence import Evidence, read
from connito.bus.streams import FACT_STREAMS
from connito.errors import NotFound
from connito.store import key_of
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.envelope_pb2 import Envelope
from connito.wire.enums import reason_name

from tests.sim.world import World
from tests.unit.connito.audit.world import RUN

LATE_OR_TWICE = {
    reasons_pb2.REASON_LATE_COMMITMENT, reasons_pb2.REASON_LATE_REVEAL, reasons_pb2.REASON_NOT_REVEALED,
    reasons_pb2.REASON_DUPLICATE_COMMITMENT, reasons_pb2.REASON_DUPLICATE_REVEAL,
}  # fmt: skip
BEFALLEN = {
    reasons_pb2.REASON_ARTIFACT_MISSING, reasons_pb2.REASON_DIGEST_MISMATCH, reasons_pb2.REASON_STORE_UNAVAILABLE,
}  # fmt: skip


class Objects:
    """The store as an auditor reads it."""

    def __init__(self, world: World) -> None:
        self._objects, self._folder = world.store.objects, world.folder / "audit"
        self._folder.mkdir(exist_ok=True)

    async def fetch(self, ref: ArtifactRef) -> Path:
        data = self._objects.get(key_of(ref))
        if data is None:
            raise NotFound("is not in the store")
        path = self._folder / ref.digest
        if not path.exists():
            path.write_bytes(data)
        return path


def evidence_of(world: World) -> Evidence:
    letters = [
        cycle_pb2.DeadLetter.FromString(Envelope.FromString(record.data).payload)
        for record in world.broker.records("DLQ")
    ]
    return read(RUN, world.broker.records(*FACT_STREAMS, "INGRESS"), world.roster, letters)


def trace(world: World) -> str:
    """A digest of everything that was written, and when."""
    said = hashlib.sha256()
    for record in world.broker.records(*world.broker.streams):
        said.update(f"{record.stream} {record.sequence} {record.subject} {record.time_unix_ms} ".encode() + record.data)
    return said.hexdigest()


def wrong_with(world: World) -> list[str]:
    """Everything that is wrong with a finished run, in sentences."""
    evidence = evidence_of(world)
    found = list(_conservation(world, evidence))
    artifacts = asyncio.run(gather(evidence, Objects(world)))
    found += [
        f"audit: {one.check} {one.where}: {one.what}"
        for one in audit(evidence, artifacts, Options(False, 0, 0.0)).differences
    ]
    # No power cut damages what is written whole: a service that copes with a damaged file must not hide that there is one.
    found += [f"{path.relative_to(world.folder)} was damaged" for path in sorted(world.folder.rglob("*.damaged"))]
    for node in world.nodes:
        found += [f"{node.name} crashed: {error!r}" for error in node.crashes if not _told(error)]
    return found


def _told(error: BaseException) -> bool:
    """Whether a service ended because its disk was full, which it says; it is started again until there is room."""
    return "No space left" in str(error)


def _conservation(world: World, evidence: Evidence) -> Iterator[str]:
    facts = evidence.facts
    if facts.ended is None:
        yield f"the run has not ended after {world.loop.now:.0f} s, in cycle {facts.cycle}"
    elif facts.ended.outcome != run_pb2.RUN_OUTCOME_COMPLETED:
        yield f"the run ended: {facts.ended.detail}"
    subjects = Counter(record.subject for record in world.broker.records(*FACT_STREAMS))
    yield from (f"{count} messages on {subject}" for subject, count in subjects.items() if count > 1)
    yield from conserved(evidence)
    yield from _opened(evidence) if world.scenario.brief else ()


def conserved(evidence: Evidence) -> Iterator[str]:
    """What was acknowledged and is missing, what counts twice, and who was refused for what befell the platform."""
    yield from _verdicts(evidence)
    yield from _versions(evidence)
    yield from _honest(evidence)


def _verdicts(evidence: Evidence) -> Iterator[str]:
    """Every reveal that was acknowledged has exactly one answer; what counts is scored once."""
    facts, answers = evidence.facts, Counter[int]()
    scored: Counter[tuple[str, int]] = Counter()
    for cycle in facts.cycles():
        window = facts.window("submit", cycle)
        accepted = [fact.message.submission for fact in facts.reveals(cycle).values()]
        answers.update(entry.reveal_sequence for entry in accepted if entry.origin_cycle == cycle)
        late = {fact.message.ingress_sequence for fact in window.refused.values()}
        answers.update(late - {entry.reveal_sequence for entry in accepted})
        yield from _left_out(evidence, cycle)
        if window.settled is None:
            continue
        scored.update((entry.miner, entry.origin_cycle) for entry in window.settled.submissions)
        inside = {entry.reveal_sequence for entry in window.settled.submissions}
        closed = window.require_closed()
        for entry in accepted:
            counts = entry.origin_cycle == cycle and entry.reveal_sequence <= closed.last_sequence
            if counts and entry.reveal_sequence not in inside | late:
                yield f"cycle {cycle}: the reveal at {entry.reveal_sequence} was accepted in time and is not settled"
    yield from (
        f"the work of {miner[:8]} in cycle {cycle} counts {n} times" for (miner, cycle), n in scored.items() if n > 1
    )
    last = max((facts.window("submit", cycle).closed.last_sequence for cycle in facts.cycles()  # type: ignore[union-attr]
                if facts.window("submit", cycle).closed is not None), default=0)  # fmt: skip
    for sequence, said in evidence.said.items():
        if said.key.kind == "reveal" and answers[sequence] != 1 and (sequence <= last or answers[sequence] > 1):
            yield f"the reveal at {sequence} of cycle {said.key.cycle} has {answers[sequence]} answers"


def _left_out(evidence: Evidence, cycle: int) -> Iterator[str]:
    """Whoever made a window close by having acted is inside it."""
    for name, sequences in (
        ("commit", {miner: one.message.ingress_sequence for miner, one in evidence.facts.commitments(cycle).items()}),
        (
            "submit",
            {miner: one.message.submission.reveal_sequence for miner, one in evidence.facts.reveals(cycle).items()},
        ),
    ):
        window = evidence.facts.window(name, cycle)
        if window.closed is None or window.closed.cause != cycle_pb2.CLOSE_CAUSE_ALL_ACTED:
            continue
        refused = {(one.message.miner, one.message.ingress_sequence) for one in window.refused.values()}
        for miner in set(window.expected) & set(sequences):
            others = {sequence for who, sequence in refused if who == miner} - {sequences[miner]}
            if sequences[miner] > window.closed.last_sequence and not others:
                yield f"cycle {cycle}: {name} closed since everybody had acted, and without {miner[:8]}"


def _versions(evidence: Evidence) -> Iterator[str]:
    facts = evidence.facts
    done = facts.ended is not None and facts.ended.outcome == run_pb2.RUN_OUTCOME_COMPLETED
    for cycle in facts.cycles():
        if (facts.window("train", cycle + 1).opened is not None or done) and facts.version(cycle) is None:
            yield f"cycle {cycle} has no version"
        scored, settled = facts.scored(cycle), facts.window("submit", cycle).settled
        if scored is None or settled is None:
            continue
        if sorted(one.miner for one in scored.verdicts) != sorted(entry.miner for entry in settled.submissions):
            yield f"cycle {cycle}: {len(scored.verdicts)} verdicts for {len(settled.submissions)} submissions"
        paid = sum(one.reward for one in scored.verdicts) + sum(one.reward for one in scored.validators)
        if paid > facts.require_spec().emission:
            yield f"cycle {cycle} paid {paid}"


def _honest(evidence: Evidence) -> Iterator[str]:
    """Nobody here cheats: whoever is refused came too late, or again; no work is rejected for what befell the platform."""
    facts, ended = evidence.facts, evidence.facts.ended_fact
    for cycle in facts.cycles():
        for window in ("commit", "submit"):
            for fact in facts.window(window, cycle).refused.values():
                over = ended is not None and fact.time_unix_ms >= ended.time_unix_ms
                if fact.message.reason not in (
                    LATE_OR_TWICE | {reasons_pb2.REASON_WRONG_WINDOW} if over else LATE_OR_TWICE
                ):
                    yield f"cycle {cycle}: refused in {window}: {reason_name(fact.message.reason)}"
        scored = facts.scored(cycle)
        for verdict in scored.verdicts if scored is not None else ():
            if verdict.reason in BEFALLEN:
                yield f"cycle {cycle}: rejected: {reason_name(verdict.reason)}"


def _opened(evidence: Evidence) -> Iterator[str]:
    revealed = {(said.signer, said.key.cycle) for said in evidence.said.values() if said.key.kind == "reveal"}
    for cycle in evidence.facts.cycles():
        settled = evidence.facts.window("commit", cycle).settled
        for miner in settled.committed if settled is not None else ():
            if (miner, cycle) not in revealed:
                yield f"cycle {cycle}: {miner[:8]} did not open its commitment"
