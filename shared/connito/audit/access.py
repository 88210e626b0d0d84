"""Access to a log and a store for an audit: a running platform, or the folder of one that has ended."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from connito.audit.archive import Archive, unsealed
from connito.audit.artifacts import Artifacts, Named, gather
from connito.audit.evidence import Evidence, Stored, read_stored
from connito.bus import Bus
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.platform.datadir import DataDir, default_data_dir
from connito.platform.servers import NatsServer, ObjectStore
from connito.platform.session import BUCKET, REGION, Session
from connito.runtime.logs import quiet
from connito.runtime.progress import Notify
from connito.store import ArtifactStore
from connito.store.cache import Cache
from connito.store.named import key_of
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.subjects import DLQ_ROOT, fact


@dataclass(frozen=True)
class Access:
    """A broker, a store that caches into a folder of our own, and the operator's roster.

    `cache` is the platform's own artifact cache where it is on this machine, to be looked into as well.
    """

    bus: Bus
    store: ArtifactStore | None
    roster: Roster
    cache: Path
    me: Identity | None = None

    async def evidence(self, run: str) -> Evidence:
        """Read and verify the stored messages of a run. Raises `NotFound` and `Retry`."""
        evidence = read_stored(run, await self.stored(run), self.roster)
        refuse_released(evidence.facts)
        return evidence

    async def stored(self, run: str) -> Stored:
        """Return what the broker holds of a run. Raises `Retry`.

        Of a run that goes on, everything up to a moment: streams are read side by side, and without the second look an
        effect could be here without its cause.
        """
        streams = (*FACT_STREAMS, "INGRESS")
        records = [record async for record in self.bus.stored(streams, run)]
        if records and not any(record.subject == fact(run, "run", 0, "ended") for record in records):
            last = max(record.time_unix_ms for record in records)
            records = [record async for record in self.bus.stored(streams, run) if record.time_unix_ms <= last]
        places = {(record.stream, record.sequence) for record in records}
        letters = [record async for record in self.bus.stored(["DLQ"]) if _about(record.subject) in places]
        library = [record async for record in self.bus.stored(["LIBRARY"])]
        return Stored(records, letters, library)

    async def artifacts(self, evidence: Evidence, wanted: Callable[[Named], bool], say: Notify) -> Artifacts:
        """Fetch and hash the artifacts that the log names and that are `wanted`. Raises `Retry` while the store is away."""
        return await gather(evidence, self, wanted=wanted, copy_of=self._copy, me=self.me, say=say)

    def _copy(self, ref: ArtifactRef) -> Path:
        """Return where the platform's cache keeps an artifact. Raises `Invalid` for a digest that is none: it could name
        any file of this machine.
        """
        key_of(ref)
        return self.cache / "sha256" / ref.digest[:2] / ref.digest

    async def fetch(self, ref: ArtifactRef) -> Path:
        """Return the stored object as a file. Raises `NotFound`, `VerificationFailed`. A size of 0 stands for any."""
        assert self.store is not None, "artifacts are asked for only where the store is open"
        size = await self.store.stat(ref)
        if size is None:
            raise NotFound("is not in the store", reason=reasons_pb2.REASON_ARTIFACT_MISSING)
        if ref.size not in (0, size):
            raise VerificationFailed(f"has {size} bytes in the store; the log says {ref.size}")
        whole = ArtifactRef()
        whole.CopyFrom(ref)
        whole.size = size
        try:
            return await self.store.fetch(whole)
        except VerificationFailed as error:
            raise VerificationFailed("does not have this digest in the store", reason=error.reason) from error


def refuse_released(facts: RunFacts) -> None:
    """Raise `NotFound` for a run whose windows are in an archive only."""
    if (gone := facts.archived) is not None and not facts.cycles():
        raise NotFound(
            f"run {facts.run} was released from the log into an archive of {gone.bytes} bytes with SHA-256 {gone.digest}; "
            "give that file with --from"
        )


def _about(subject: str) -> tuple[str, int]:
    """Return which message a dead letter is a copy of."""
    stream, _, sequence = subject.removeprefix(f"{DLQ_ROOT}.").partition(".")
    return stream, int(sequence) if sequence.isdecimal() else 0


@asynccontextmanager
async def opened(folder: Path | None, data_dir: Path | None, *, files: bool = True) -> AsyncIterator[Access | Archive]:
    """Reach the platform: the one that runs, or with `folder`, what an ended `connito up` left there, or an archive. Without
    `files` no artifact can be fetched, and nothing is asked that opens the store.

    Raises `NotFound` when there is none, `Retry` when the folder is in use, `Invalid` for a file that is no archive.
    """
    async with AsyncExitStack() as stack:
        fresh = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="connito-audit-")))
        if folder is not None and folder.is_file():
            yield stack.enter_context(unsealed(folder, fresh, _own_key(data_dir)))
            return
        if folder is not None:
            yield await _reopen(folder, fresh, stack)
            return
        session = Session.open(data_dir, role="customer", wake=True)
        bus = await stack.enter_async_context(session.bus())
        if not files:
            yield Access(bus, None, session.roster, fresh)
            return
        store = session.store()
        cache = store.cache.folder
        # What lies in a cache says nothing about the store.
        store.cache = Cache(fresh)
        yield Access(bus, store, session.roster, cache, session.identity)


async def _reopen(folder: Path, fresh: Path, stack: AsyncExitStack) -> Access:
    """Start the servers over the folder's data; nothing else is started, and nothing is written but their own files."""
    secret = folder / "keys" / "store.secret"
    for needed in (folder / "nats", folder / "objects", folder / "roster.json", secret):
        if not needed.exists():
            raise NotFound(f"{folder} is not what `connito up` leaves behind: {needed.name} is missing there")
    data = DataDir(folder.absolute())
    stack.enter_context(data.lock())
    quiet()
    nats = NatsServer(data.root / "nats", log_file=fresh / "nats-server.log")
    weed = ObjectStore(data.root / "objects", secret_key=secret.read_text().strip(), log_file=fresh / "weed.log")
    for server in (nats, weed):
        stack.callback(server.stop)
    await asyncio.gather(asyncio.to_thread(nats.start), asyncio.to_thread(weed.start))
    bus = await stack.enter_async_context(await Bus.connect(nats.url, None, "audit"))
    store = ArtifactStore(weed.url, weed.access_key, weed.secret_key, BUCKET, REGION, fresh)
    return Access(bus, store, Roster.load(data.roster), data.cache, _key_at(data.keys / "customer.nk"))


def _own_key(data_dir: Path | None) -> Identity | None:
    """Return the key with which somebody opens what an archive holds sealed; None for somebody who has none here."""
    return _key_at(
        Path(os.environ.get("CONNITO_KEY_FILE") or (data_dir or default_data_dir()) / "keys" / "customer.nk")
    )


def _key_at(path: Path) -> Identity | None:
    return Identity.load(path) if path.exists() else None


def check_tolerance(tolerance: float) -> None:
    """Raise `Invalid` for a tolerance that is not one."""
    if not tolerance >= 0:
        raise Invalid(f"--tolerance is {tolerance:g}; give nats per token, 0 for equal bits")
