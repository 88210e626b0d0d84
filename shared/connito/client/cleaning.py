"""Collect what nobody refers to any more in the store, and what was said of runs that do not exist (ADR 24)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.message import Message

from connito.base.upload import MANIFEST_TYPE
from connito.bus import Bus, streams
from connito.bus.streams import FACT_STREAMS
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.platform.log import read_log
from connito.platform.session import Session
from connito.protocol.retention import horizon
from connito.render import formats
from connito.runtime.progress import Notify, silent
from connito.runtime.tasks import blocking
from connito.store import ArtifactStore
from connito.store.named import StoredObject, ref_of_key
from connito.store.owner import claim
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire import subjects
from connito.wire.fact import Fact, Record
from connito.wire.parts import Parts
from connito.wire.roster import Roster
from connito.wire.sealing import NoKey
from connito.wire.subjects import run_of
from connito.wire.verification import verify_fact, verify_ingress

DAY = 86400.0
# Larger artifacts, and tensors, name no others.
READ_BYTES = 64 << 20
_DIGEST = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(frozen=True)
class Cleaning:
    """Objects of the store that nothing refers to, and what stays; runs that never began and of which a miner said something.
    `removed`: whether they are gone.
    """

    stale: list[StoredObject]
    kept: list[StoredObject]
    strays: list[str]
    removed: bool


def clean(session: Session, *, older_than_s: float = DAY, remove: bool = False, say: Notify = silent) -> Cleaning:
    """Find what no message of the log names, directly or through another artifact, and no base; with `remove`, delete it.
    Cycles that a run's `retention.cycles` does not keep count as naming nothing. Raises `Fatal` for another platform's bucket.

    Younger objects than `older_than_s` seconds stay: somebody may be about to name them. For the operator. Raises `Invalid`
    for a negative age, `Retry` while broker or store are away.
    """
    if not older_than_s >= 0:
        raise Invalid(f"an age of {older_than_s:g} s is none")

    async def work() -> Cleaning:
        store = session.store()
        await claim(store, session.roster, first=False)
        async with session.bus() as bus:
            return await collect(bus, store, session.roster, older_than_s=older_than_s, remove=remove, say=say)

    return blocking(work())


async def collect(
    bus: Bus,
    store: ArtifactStore,
    roster: Roster,
    *,
    older_than_s: float = DAY,
    remove: bool = False,
    say: Notify = silent,
) -> Cleaning:
    """Do what `clean` does, over connections that there are."""
    # First the store, then the log: what is named in between was stored before.
    objects = await store.objects()
    say(f"{formats.count(len(objects), 'object')} in the store")
    named, expired, unopened = await _named(bus, roster, store)
    say(f"{formats.count(len(named), 'artifact')} named")
    stale = [
        one
        for one in objects
        if one.digest not in named
        and (one.digest in expired or one.age_s >= older_than_s)
        and ref_of_key(one.key, 0).secret not in unopened
    ]
    for one in stale:
        if one.size <= READ_BYTES and await store.media_type(one.key) == MANIFEST_TYPE:
            # A base may wait for its first run.
            named |= {one.digest, *await _inside(store, ref_of_key(one.key, one.size))}
    stale = [one for one in stale if one.digest not in named]
    if remove:
        for number, one in enumerate(stale, 1):
            say(f"removing {number} of {len(stale)}")
            await store.remove(one.key, 0.0 if one.digest in expired else older_than_s)
    gone = {one.key for one in stale}
    strays = await stray_runs(bus, older_than_s)
    for run in strays if remove else ():
        await streams.release(bus.js, run, ("INGRESS",))
    return Cleaning(stale, [one for one in objects if one.key not in gone], strays, remove)


async def stray_runs(bus: Bus, older_than_s: float) -> list[str]:
    """Return the names that miners wrote of as of runs, and that are none: nothing was said of them in the last `older_than_s`
    seconds, and nobody has created them. What a key makes up is stored until this is done.
    """
    begun: set[str] = set()
    last: dict[str, int] = {}
    async for record in bus.stored(("RUNS", "INGRESS")):
        run = run_of(record.subject)
        if record.stream == "INGRESS":
            last[run] = record.time_unix_ms
        elif record.subject == subjects.fact(run, "run", 0, "created"):
            begun.add(run)
    before = 1000 * (await bus.time() - older_than_s)
    return sorted(run for run, at in last.items() if run not in begun and at <= before)


async def _named(bus: Bus, roster: Roster, store: ArtifactStore) -> tuple[set[str], set[str], set[str]]:
    """Return the digests that the log names, those that it named until their cycle was too long ago, and the secrets that this
    key does not open: what else was made under them, nobody here can tell.

    Of a run that an archive holds, only what the library says of it counts.
    """
    # What is kept follows from these; a log that is read twice need not be held.
    runs = (await read_log(bus, roster, streams=("RUNS", "TRAIN", "LIBRARY"))).runs
    refs: dict[str, ArtifactRef] = {}
    expired, parts = set[str](), Parts()
    async for record in bus.stored((*FACT_STREAMS, "INGRESS")):
        if (fact := _verified(record, parts, roster)) is None:
            continue
        run = runs.get(fact.run)
        if run is not None and run.archived is not None and fact.key.section != "library":
            continue
        if run is not None and _cycle_of(fact) and _cycle_of(fact) + 1 < horizon(run):
            expired.update(ref.digest for ref in references(fact.message))
        else:
            refs.update((ref.digest, ref) for ref in references(fact.message))
    inside, unopened = list[str](), set[str]()
    for ref in refs.values():
        try:
            inside += await _inside(store, ref)
        except NoKey:
            unopened.add(ref.secret)
    kept = {*refs, *inside, *(ref.secret for ref in refs.values())}
    return kept, expired - kept, unopened


def _cycle_of(fact: Fact) -> int:
    """Return the cycle that a fact, or what a miner said, belongs to; 0 for the run."""
    return fact.key.cycle or int(getattr(fact.message, "cycle", 0))


def _verified(record: Record, parts: Parts, roster: Roster) -> Fact | None:
    with suppress(Invalid):
        if record.stream == "INGRESS":
            return verify_ingress(record)
        whole = parts.take(record, roster)
        return None if whole is None else verify_fact(whole, roster)
    return None


def references(message: Message) -> Iterator[ArtifactRef]:
    """Yield every reference to an artifact in a message, in whatever field."""
    if isinstance(message, ArtifactRef):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        several = value.values() if field.message_type.GetOptions().map_entry else value
        for one in several if field.is_repeated else [value]:
            if isinstance(one, Message):
                yield from references(one)


async def _inside(store: ArtifactStore, ref: ArtifactRef) -> list[str]:
    """Return the digests that an artifact has in it as text: a manifest its files, a report its statistics."""
    if ref.size > READ_BYTES or "safetensors" in ref.media_type:
        return []
    try:
        data = await store.get_bytes(ref)
    except NoKey:
        raise
    except (NotFound, VerificationFailed, Invalid):
        return []
    return [digest.decode() for digest in _DIGEST.findall(data)]
