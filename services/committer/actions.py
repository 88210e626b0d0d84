"""Answer miners' messages in the order of INGRESS, and settle windows that have closed."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from connito.bus import Bus
from connito.bus.handover import take_over
from connito.bus.lease import Lease, token_of
from connito.bus.offences import kind_of, report
from connito.bus.streams import DURABLES
from connito.errors import Invalid, NotFound, Retry
from connito.protocol.findings import Refusal
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.service.engine import Action
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.views.sentences import detail_of
from connito.wire.checkpoint import Checkpoint
from connito.wire.enums import reason_name
from connito.wire.fact import Fact, Record
from connito.wire.facts import RunFacts
from connito.wire.heads import ingress_origin_of

from . import judging, settlement
from .content import ContentCheck
from .handlers import Acknowledge, Settle
from .settlement import Write
from .state import FACTS, State, lane_of

log = get_logger("committer")

DURABLE = "committer"
# Messages of different keys and runs that are answered side by side; of what they wait for, little is work.
LANES = 32
# Another replica may be the one that answers: look again after this.
LOOK_SECONDS = 0.05
_ATTEMPTS = 5


class Committer:
    """`handle` is the durable consumer's handler, `perform` the engine's."""

    def __init__(self, bus: Bus, state: State, check: ContentCheck) -> None:
        self._bus, self._state, self._check = bus, state, check
        self._handled = asyncio.Event()

    async def handle(self, record: Record) -> None:
        """Answer one message. Raises `Invalid` for what nobody can be answered about, `Retry` when something is away."""
        try:
            await self._answer(self._state.verified(record))
        except Invalid as error:
            if self._state.worth_a_letter(record, error):
                raise
        finally:
            self._handled.set()

    async def _answer(self, fact: Fact) -> None:
        """Judge and write; once more on current facts before anything is refused, or when the broker knew better."""
        current = False
        for _ in range(_ATTEMPTS):
            try:
                write = await self._judge(fact)
            except NotFound:
                if current:
                    raise
                write, final = None, False
            else:
                final = current or write is None or write.kind == "accepted"
            if write is not None and write.kind == "accepted" and await self._overtakes(fact):
                raise Retry(f"what {fact.signer} said before INGRESS {fact.sequence} is answered first", after=0.2)
            if final and (write is None or await self._publish(fact.run, write)):
                return
            await self._state.refresh(self._bus, FACTS)
            current = True
        raise Retry(f"the answer to {fact.key.kind} at INGRESS {fact.sequence} keeps changing")

    async def _overtakes(self, fact: Fact) -> bool:
        """Return whether another of the key stands before this one and is still to be answered: the broker may have given it
        to a replica that is gone, and gives it out again only after a while.
        """
        await self._state.reach("INGRESS", fact.sequence)
        earlier = self._state.earlier(fact)
        # What nobody can be answered about has no answer, and is behind the floor.
        return bool(earlier) and await self._bus.ack_floor(DURABLE) < earlier[-1]

    async def _judge(self, fact: Fact) -> Write | None:
        facts = judging.known_run(self._state.runs.get(fact.run), fact.run)
        if self._state.over(fact):
            return self._over_quota(facts, fact)
        if isinstance(fact.message, cycle_pb2.Commitment):
            answer = judging.judge_commitment(facts, fact)
            if isinstance(answer, cycle_pb2.CommitmentAccepted):
                return Write("commit", answer.cycle, "accepted", answer.miner, answer)
            return None if answer is None else settlement.refuse("commit", answer.cycle, answer)
        return await self._judge_reveal(facts, fact)

    def _over_quota(self, facts: RunFacts, fact: Fact) -> Write | None:
        """Return one refusal that says so; what follows in the same cycle is dropped."""
        metrics.REFUSALS.labels(reason_name(reasons_pb2.REASON_QUOTA_EXCEEDED)).inc()
        answer = judging.judge_quota(facts, fact)
        window = judging.window_of(fact)
        return None if answer is None else settlement.refuse(window, answer.cycle, answer)

    async def _judge_reveal(self, facts: RunFacts, fact: Fact) -> Write | None:
        judged = judging.judge_reveal(facts, fact)
        if judged is None:
            return None
        answer = await self._look(facts, fact, judged) if isinstance(judged, judging.CheckContent) else judged
        if isinstance(answer, cycle_pb2.RevealAccepted):
            return Write("submit", answer.cycle, "accepted", answer.submission.miner, answer)
        return settlement.refuse("submit", answer.cycle, answer)

    async def _look(
        self, facts: RunFacts, fact: Fact, judged: judging.CheckContent
    ) -> cycle_pb2.RevealAccepted | cycle_pb2.Refused:
        refusal = await self._check(facts, judged.artifact, judged.base)
        return judged.then if refusal is None else judging.refused("submit", fact, refusal)

    async def _publish(self, run: str, write: Write) -> bool:
        written = await self._bus.publish_fact(run, write.section, write.cycle, write.kind, write.message, write.id)
        if written:
            self._report(run, write)
        return written

    def _report(self, run: str, write: Write) -> None:
        message = write.message
        if isinstance(message, cycle_pb2.Refused):
            metrics.REFUSALS.labels(reason_name(message.reason)).inc()
            if message.reason in (reasons_pb2.REASON_BANNED, reasons_pb2.REASON_QUOTA_EXCEEDED):
                report(kind_of(message.reason), key=message.miner, reason=message.reason, detail=detail_of(message))
            log.info(
                "refused", run=run, cycle=write.cycle, window=write.section, miner=message.miner,
                sequence=message.ingress_sequence, why=judging.describe(message),
            )  # fmt: skip
        if write.section == "submit" and isinstance(message, cycle_pb2.Refused):
            metrics.SUBMISSIONS.labels("refused", reason_name(message.reason)).inc()
        if isinstance(message, cycle_pb2.RevealAccepted):
            metrics.SUBMISSIONS.labels("accepted", "").inc()
            metrics.UPLOAD_BYTES.inc(message.submission.artifact.size)
        if isinstance(message, cycle_pb2.WindowSettled):
            log.info(
                "settled", run=run, cycle=write.cycle, window=write.section, last_sequence=message.last_sequence,
                committed=len(message.committed), submissions=len(message.submissions),
            )  # fmt: skip

    async def answer(self, lease_seconds: float) -> None:
        """Answer miners for as long as this replica leads, and stand by otherwise; until cancelled.

        One replica at a time: what one key says is judged in its order. What a replica that was killed had taken comes back
        before anything new, once the broker has waited for it.
        """
        token = token_of(self._bus)
        while True:
            async with Lease(self._bus, DURABLE, lease_seconds, token) as lease:
                await self._let_come_back()
                consuming = asyncio.create_task(
                    self._bus.consume(
                        DURABLE,
                        self.handle,
                        concurrency=LANES,
                        lane=lane_of,
                        skip=self._state.needless,
                        aside=self.refuse,
                    )
                )
                losing = asyncio.create_task(lease.lost.wait())
                try:
                    await asyncio.wait((consuming, losing), return_when=asyncio.FIRST_COMPLETED)
                    if consuming.done():
                        consuming.result()
                finally:
                    await end_tasks([consuming, losing])

    async def _let_come_back(self) -> None:
        """Draw nothing before what one before has drawn and not answered is the next to come."""
        host = self._bus.host
        give_up = host.monotonic() + DURABLES[DURABLE].ack_wait
        while True:
            try:
                if await take_over(self._bus, DURABLE) or host.monotonic() > give_up:
                    return
                await asyncio.sleep(LOOK_SECONDS)
            except Retry as error:
                log.warning("cannot ask for what was taken before, trying again", error=str(error))
                await asyncio.sleep(error.after)

    async def perform(self, action: Action) -> None:
        """Do what `handlers.decide` found. Raises `Retry`."""
        facts = self._state.runs[action.run]
        match action.payload:
            case Settle(window, cycle):
                await self._settle(facts, window, cycle)
            case Acknowledge():
                await self._acknowledge(facts)

    async def _acknowledge(self, facts: RunFacts) -> None:
        heard, number = self._state.heard[facts.run], self._state.heard[facts.run].number + 1
        checkpoint = Checkpoint(ingress_origin_of(facts), heard.tree.size, heard.tree.root).signed(self._bus.identity)
        message = run_pb2.IngressHead(
            run=facts.run, cycle=number, checkpoint=checkpoint.note, last_sequence=heard.last_sequence
        )
        await self._bus.publish_fact(facts.run, "run", number, "received", message)

    async def _settle(self, facts: RunFacts, window: str, cycle: int) -> None:
        closed = facts.window(window, cycle).require_closed()
        await self._state.reach("INGRESS", closed.last_sequence)
        await self._answered_up_to(facts.run, closed.last_sequence)
        for write in settlement.settle(facts, self._state.reveals[facts.run], window, cycle):
            await self._publish(facts.run, write)

    async def _answered_up_to(self, run: str, sequence: int) -> None:
        """Wait until every message of a run up to `sequence` has its answer in the facts, whatever other runs wait for.

        Where nothing is left in the queue, what has no answer is a dead letter.
        """
        await self._state.refresh(self._bus, FACTS)
        while self._state.unanswered(run, sequence) is not None and await self._bus.ack_floor(DURABLE) < sequence:
            self._handled.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._handled.wait(), LOOK_SECONDS)
            await self._state.refresh(self._bus, FACTS)
        await self._state.refresh(self._bus, FACTS)

    async def refuse(self, record: Record, error: Invalid) -> None:
        """Answer a message that is put aside, if anybody can be answered about it: what is acknowledged ends in a verdict."""
        try:
            fact = self._state.verified(record)
            judging.known_run(self._state.runs.get(fact.run), fact.run)
        except Invalid:
            return
        window = judging.window_of(fact)
        answer = judging.refused(window, fact, Refusal.of(error))
        await self._publish(fact.run, settlement.refuse(window, answer.cycle, answer))
