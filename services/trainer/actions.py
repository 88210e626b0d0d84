"""Performing what the miner decided. Each effect is marked in the work folder only after it was acknowledged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from connito.bus import Bus
from connito.errors import Environment, Invalid
from connito.protocol.commitment import commitment_digest
from connito.protocol.provenance import check_start
from connito.runtime import logs, metrics
from connito.service.engine import Action
from connito.store.cache import digest_of_file
from connito.v1 import cycle_pb2, services_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.wire import subjects
from connito.wire.enums import reason_name
from connito.wire.facts import RunFacts
from connito.wire.locked import lock_file
from connito.workloads.fetching import fetch_state

from . import feedback
from .adapters import Downloads, Services
from .handlers import Commit, Enrol, KeepReceipt, LogDecision, ReportTrained, Reveal, Train
from .own import LAST_LOOK_SECONDS
from .state import CycleProgress, Ledger
from .strategy import Effort, Strategy, Work

log = logs.get_logger("miner")


class Trainer(Protocol):
    """Makes the honest local steps (`services.trainer.training`)."""

    async def train(self, facts: RunFacts, cycle: int, state: Path, draft: Path) -> Effort:
        """Train H steps from the state in `state` and write the result to `draft`."""


@dataclass
class Miner:
    """The dependencies of a miner's actions."""

    bus: Bus
    services: Services
    downloads: Downloads
    ledger: Ledger
    trainer: Trainer
    strategy: Strategy
    facts: Callable[[str], RunFacts]
    label: str = ""
    invite: str = ""

    @property
    def me(self) -> str:
        """Return this miner's public key."""
        return self.bus.identity.public

    async def perform(self, action: Action) -> None:
        """Do one thing. Raises `Retry` and `Invalid` as the engine understands them."""
        match action.payload:
            case Enrol():
                await self._enrol(action.run)
            case Train(cycle):
                await self._train(action.run, cycle)
            case ReportTrained(cycle):
                await self._say_trained(action.run, cycle)
            case Commit(cycle):
                await self._commit(action.run, cycle)
            case Reveal(cycle):
                await self._reveal(action.run, cycle)
            case KeepReceipt():
                await self._keep_receipt(action.run)
            case LogDecision() as tell:
                self._log(action.run, tell)

    async def _keep_receipt(self, run: str) -> None:
        """Keep the newest receipt for what was said and stands in the log; for what was acknowledged only, it is none."""
        receipt = self.facts(run).newest_receipt
        if receipt is None:
            return
        for mine in list(self.ledger.progress(run).values()):
            covered = sorted({sequence for sequence in mine.unreceipted if sequence <= receipt.last_sequence})
            if standing := [sequence for sequence in covered if await self._stands(run, sequence)]:
                self.ledger.keep_receipt(run, mine.cycle, receipt, standing)
            # Of two that were told the same place one stands there, and has its receipt.
            gone = [sequence for sequence in covered if sequence not in standing or mine.places.count(sequence) > 1]
            for sequence in gone:
                log.error(
                    "left out: the broker acknowledged a message of this miner's, and the log holds another one or none there; "
                    "no receipt is for it, so it cannot be shown to others", security=True, cycle=mine.cycle, ingress=sequence,
                )  # fmt: skip
            if gone:
                self.ledger.settle(run, mine.cycle, gone, *(f"left-out-{sequence}" for sequence in gone))

    async def _stands(self, run: str, sequence: int) -> bool:
        """Return whether a message of this miner's stands where one was acknowledged."""
        for wait in (LAST_LOOK_SECONDS, 0.0):
            record = await self.bus.look("INGRESS", seq=sequence)
            if record is not None:
                return subjects.parse_ingress(record.subject)[:2] == (run, self.me)
            # A replica of the broker may be a moment behind.
            await asyncio.sleep(wait)
        return False

    async def _enrol(self, run: str) -> None:
        await self.services.enrol(run, self.label, self.invite)
        log.info("enrolled", label=self.label)

    async def _train(self, run: str, cycle: int) -> None:
        logs.bind_run(run, cycle)
        facts, ledger = self.facts(run), self.ledger
        opened, spec = facts.window("train", cycle).require_opened(), facts.require_spec()
        check_start(facts, cycle)
        ledger.prune(run, before=cycle - 1)
        state = await fetch_state(facts, opened.state, self.downloads.cache, partial(self.downloads.fetch, run))
        draft = ledger.folder(run, cycle) / "draft.safetensors"

        async def honest() -> Effort:
            return await self.trainer.train(facts, cycle, state, draft)

        effort = await self.strategy.produce(Work(run, cycle, self.me, state, draft, spec.training, honest))
        code = partial(feedback.code, facts, self.me, cycle, state, draft, ledger.folder(run, cycle).parent / "left")
        made = await asyncio.to_thread(code)
        made, key, content = await asyncio.to_thread(self._locked, run, cycle, made)
        artifact = ledger.keep_artifact(run, cycle, made)
        digest, size = await asyncio.to_thread(digest_of_file, artifact)
        salt = self._salt(run, cycle, digest)
        commitment = commitment_digest(run, cycle, self.me, opened.state.digest, digest, salt)
        ledger.update(
            run,
            cycle,
            base_state=opened.state.digest,
            artifact=digest,
            size=size,
            key=key.hex(),
            content=content,
            commitment=commitment.hex(),
            steps=effort.steps,
            tokens=effort.tokens,
            seconds=round(effort.seconds, 3),
            evaluated=effort.evaluated,
        )
        log.info("result kept", artifact=digest[:12], bytes=size, seconds=round(effort.seconds, 2))

    async def _say_trained(self, run: str, cycle: int) -> None:
        mine = self.ledger.cycle(run, cycle)
        message = cycle_pb2.TrainingFinished(
            run=run, cycle=cycle, steps=mine.steps, tokens=mine.tokens, seconds=mine.seconds
        )
        sequence = await self.bus.publish_ingress(run, "trained", message)
        self.ledger.said(run, cycle, sequence, said=True)

    async def _commit(self, run: str, cycle: int) -> None:
        logs.bind_run(run, cycle)
        digest = bytes.fromhex(self.ledger.cycle(run, cycle).commitment)
        message = cycle_pb2.Commitment(run=run, cycle=cycle, digest=digest)
        self.ledger.said(run, cycle, await self.bus.publish_ingress(run, "commitment", message), committed=True)
        log.info("committed", commitment=digest.hex()[:12])

    async def _reveal(self, run: str, cycle: int) -> None:
        logs.bind_run(run, cycle)
        mine = self.ledger.cycle(run, cycle)
        salt = self._salt(run, cycle, mine.artifact)
        artifact = ArtifactRef(
            digest=mine.artifact,
            size=mine.size,
            media_type=feedback.media_type(self.facts(run)),
            realm=REALM_SUBMISSION,
        )
        try:
            await self._upload(run, mine, artifact, salt)
        except Environment:
            raise
        except Invalid as refusal:
            log.warning(f"upload refused: {reason_name(refusal.reason)}: {refusal}")
            metrics.REFUSALS.labels(reason_name(refusal.reason)).inc()
            if not self.strategy.reveals_after(refusal):
                raise
        # Told only now: the upload was nobody's to read before.
        artifact.key, artifact.content = bytes.fromhex(mine.key), mine.content
        reveal = cycle_pb2.Reveal(run=run, cycle=cycle, artifact=artifact, base_state_digest=mine.base_state, salt=salt)
        self.ledger.said(run, cycle, await self.bus.publish_ingress(run, "reveal", reveal), revealed=True)
        log.info("revealed", artifact=mine.artifact[:12])

    async def _upload(self, run: str, mine: CycleProgress, artifact: ArtifactRef, salt: bytes) -> None:
        slot = await self.services.upload_slot(
            services_pb2.UploadCommand(
                run=run, cycle=mine.cycle, artifact=artifact, base_state_digest=mine.base_state, salt=salt
            )
        )
        if slot.present:
            return
        if await self.services.upload(slot, self.ledger.artifact_path(run, mine.cycle)):
            metrics.UPLOAD_BYTES.inc(artifact.size)
            log.info("uploaded", bytes=artifact.size)

    def _locked(self, run: str, cycle: int, made: Path) -> tuple[Path, bytes, str]:
        """Lock a result under a key of its own; return the new file in its place, the key, and what it opens to."""
        content, _ = digest_of_file(made)
        key, locked = self.bus.identity.derive("locked", run, str(cycle), content), made.with_suffix(".locked")
        lock_file(made, locked, key, content)
        made.unlink()
        return locked, key, content

    def _salt(self, run: str, cycle: int, artifact_digest: str) -> bytes:
        return self.bus.identity.derive("salt", run, str(cycle), artifact_digest)

    def _log(self, run: str, tell: LogDecision) -> None:
        logs.bind_run(run, tell.cycle)
        if tell.reason:
            metrics.REFUSALS.labels(tell.reason).inc()
            log.warning(tell.text)
        else:
            log.info(tell.text)
        told = self.ledger.cycle(run, tell.cycle).told
        self.ledger.update(run, tell.cycle, told=(*told, tell.name))
