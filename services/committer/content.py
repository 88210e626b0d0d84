"""Looking into what was uploaded, before a model sees it. Every artifact is examined once, a few at a time."""

from __future__ import annotations

import asyncio
import tempfile
from collections import OrderedDict
from contextlib import ExitStack, suppress
from pathlib import Path

from connito.errors import ConnitoError, Invalid, ObjectDamaged, ObjectMissing, Retry
from connito.protocol.coding import decoded, is_coded
from connito.protocol.findings import Refusal
from connito.protocol.submission import read_header, validate_move
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import here_and_now
from connito.store import ArtifactStore
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.cycle_pb2 import Finding
from connito.v1.run_pb2 import RunSpec, SelectionMade
from connito.wire.facts import RunFacts
from connito.wire.locked import unlocked

log = get_logger("committer.content")

REMEMBERED, BASES = 10_000, 16
# What is this small is read into memory: making its file in the cache would cost more than all of its examination.
SMALL = 1 << 17


class ContentCheck:
    """`await check(facts, artifact)` is None when the artifact is a well-formed submission, else the refusal.

    Callers that ask for the same artifact share one examination.
    """

    def __init__(self, store: ArtifactStore, slots: int) -> None:
        self._store = store
        self._slots = asyncio.Semaphore(slots)
        # States that cycles began from, hashed when they were fetched. A refusal is never given by one of these alone.
        self._bases: OrderedDict[str, Path] = OrderedDict()
        self._verdicts: OrderedDict[tuple[str, ...], asyncio.Task[Refusal | None]] = OrderedDict()

    async def __call__(self, facts: RunFacts, artifact: ArtifactRef, base: ArtifactRef) -> Refusal | None:
        """Check an upload against the state that its cycle started from. Raises an
        `Environment` when that is not possible here and now.
        """
        # Whoever names the same bytes with another key must not decide for the one whose they are.
        key = (facts.run, artifact.digest, artifact.key.hex(), artifact.content, base.digest)
        task = self._verdicts.get(key)
        if task is None:
            task = self._verdicts[key] = asyncio.create_task(self._examine(facts, artifact, base))
            task.add_done_callback(lambda done: self._forget_passing(key, done))
            while len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        # One caller that is cancelled must not take the examination from the others.
        return await asyncio.shield(task)

    def _forget_passing(self, key: tuple[str, ...], task: asyncio.Task[Refusal | None]) -> None:
        """Forget a temporary fault, or an object that may still be uploaded, so that it is checked again."""
        failed = task.cancelled() or task.exception() is not None
        refusal = None if failed else task.result()
        if failed or (refusal is not None and refusal.reason == reasons_pb2.REASON_ARTIFACT_MISSING):
            self._verdicts.pop(key, None)

    async def aclose(self) -> None:
        """Stop what is still being examined."""
        await end_tasks(self._verdicts.values())

    async def _examine(self, facts: RunFacts, artifact: ArtifactRef, base: ArtifactRef) -> Refusal | None:
        async with self._slots:
            try:
                # What lies in the cache under this digest, perhaps in another realm, says nothing about the store.
                small, stored = artifact.size <= SMALL, self._store
                found = await (stored.get_bytes(artifact) if small else stored.fetch(artifact, stored=True))
            except (ObjectMissing, ObjectDamaged, Retry) as error:
                return await self._not_as_said(artifact, error)
            return await self._check(facts, found, artifact, base)

    async def _not_as_said(self, artifact: ArtifactRef, error: ConnitoError) -> Refusal:
        """Return the refusal of what is not in the store, or is something else there. Raises `error` for a fault of the store."""
        stored = await self._store.stat(artifact)
        if stored is None:
            finding = Finding(kind=cycle_pb2.FINDING_KIND_NOT_UPLOADED, name=artifact.digest)
            return Refusal(reasons_pb2.REASON_ARTIFACT_MISSING, finding)
        if stored != artifact.size:
            finding = Finding(kind=cycle_pb2.FINDING_KIND_OTHER_SIZE, count=stored, limit=artifact.size)
            return Refusal(reasons_pb2.REASON_DIGEST_MISMATCH, finding)
        if isinstance(error, ObjectDamaged):
            # Nobody has looked at it before: these are the bytes that were uploaded.
            return Refusal(reasons_pb2.REASON_DIGEST_MISMATCH, Refusal.of(error).finding)
        raise error

    async def _check(
        self, facts: RunFacts, found: Path | bytes, artifact: ArtifactRef, base: ArtifactRef
    ) -> Refusal | None:
        async def by(start: Path) -> Refusal | None:
            spec, selection = facts.require_spec(), facts.require_selection()
            refusal = await asyncio.to_thread(check_artifact, found, artifact, start, spec, selection)
            self._bases[base.digest] = start
            self._bases.move_to_end(base.digest)
            if len(self._bases) > BASES:
                self._bases.popitem(last=False)
            return refusal

        # It stays there for those who are examined beside this one: each would hash all of it anew.
        known = self._bases.get(base.digest)
        if known is not None:
            # It may be gone from the cache by now, or a disk return other bytes than before.
            with suppress(ConnitoError, OSError):
                if await by(known) is None:
                    return None
        return await by(await self._store.fetch(base))


def check_artifact(
    found: Path | bytes, artifact: ArtifactRef, base: Path, spec: RunSpec, selection: SelectionMade
) -> Refusal | None:
    """Return why an upload, a file or its bytes, is no submission to a cycle whose θ_t is at `base`; None when it is one. Raises
    only for what is wrong with this machine.
    """
    expected = read_header(base)
    try:
        with ExitStack() as stack:
            rows = found
            if artifact.key or is_coded(spec.training):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="connito-examine-")))
                path = found if isinstance(found, Path) else folder / "upload"
                if isinstance(found, bytes):
                    path.write_bytes(found)
                rows = decoded(unlocked(path, artifact, folder), base, spec.training, folder)
            validate_move(rows, expected, base, spec, selection)
    except Exception as error:  # a hostile file must not be able to stop the service
        if here_and_now(error) is not None:
            raise
        if isinstance(error, Invalid):
            return Refusal.of(error)
        log.error("an artifact broke its examination", security=True, digest=artifact.digest, error=repr(error))
        text = f"the file cannot be read as safetensors: {error!r}"
        return Refusal.of(Invalid(text, reason=reasons_pb2.REASON_BAD_HEADER))
    return None
