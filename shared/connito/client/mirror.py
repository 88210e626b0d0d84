"""Experts of a platform at rest, copied onto its shelf: what was deposited while it ran can be taken from when nothing does."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from connito.errors import Environment, Invalid, VerificationFailed
from connito.library.attestation import countersign
from connito.library.attestation import encode as encode_attestation
from connito.library.governance import Viewer
from connito.library.schema import ExpertRecord, read_record
from connito.library.shelf import Shelf
from connito.platform.datadir import DataDir
from connito.platform.log import read_log
from connito.platform.resting import rests
from connito.platform.session import Session
from connito.runtime.logs import get_logger
from connito.runtime.tasks import blocking
from connito.store import ArtifactStore
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.services_pb2 import ExpertSummary
from connito.wire.fact import Fact, Record
from connito.wire.subjects import fact as fact_subject
from connito.wire.verification import verify_fact

log = get_logger("mirror")

_SAID = {
    run_pb2.NOTICE_KIND_DEPRECATED: "deprecated",
    run_pb2.NOTICE_KIND_YANKED: "yanked",
    run_pb2.NOTICE_KIND_RESTORED: "restored",
    run_pb2.NOTICE_KIND_OPTED_OUT: "opted-out",
    run_pb2.NOTICE_KIND_OPTED_IN: "opted-in",
}


def mirror(data: DataDir, shelf: Shelf) -> None:
    """Copy what its customer may see of a resting platform's library, and what was said about it, unless that was done since
    it last ran. Whatever cannot be read now is left for the next time."""
    stamp, begun = shelf.root / ".mirrored", data.root / "threads"
    if data.owner() is not None or not rests(data) or not begun.exists():
        return
    if stamp.exists() and stamp.stat().st_mtime_ns > begun.stat().st_mtime_ns:
        return
    with suppress(Environment):
        blocking(_copy(Session.open(data.root, role="customer", wake=True), shelf))
        stamp.touch()


async def _copy(session: Session, shelf: Shelf) -> None:
    me, store, held = session.identity.public, session.store(), shelf.held()
    viewer = Viewer(me, session.roster.memberships(me))
    async with session.bus() as bus:
        runs = (await read_log(bus, session.roster)).runs
        for run, facts in runs.items():
            for expert, deposit in facts.deposits.items():
                if expert in held:
                    continue
                try:
                    signed = await bus.last_record(fact_subject(run, "library", 0, "deposited", expert))
                    await _shelve(store, shelf, viewer, deposit, signed)
                except Environment:
                    raise
                except Invalid as error:
                    # The platform's library leaves such a one out too; it keeps no other from the shelf.
                    log.warning("an expert is not copied", expert=expert, error=str(error))
        found = [_notice(record, session) async for record in bus.stored(["LIBRARY"])]
    _say(shelf, [notice for notice in found if notice is not None])


async def _shelve(
    store: ArtifactStore, shelf: Shelf, viewer: Viewer, deposit: Fact[run_pb2.ExpertDeposited], signed: Record | None
) -> None:
    said = deposit.message
    record = read_record(await store.get_bytes(said.record), said.expert_id)
    if not viewer.sees(record):
        return
    attestation = None
    if said.HasField("attestation") and signed is not None:
        part = json.loads(await store.get_bytes(said.attestation))
        attestation = encode_attestation(countersign(part, signed.subject, signed.data)).decode()
    await shelve(shelf, said, record, store.fetch, deposit.time_unix_ms, attestation)


def _notice(record: Record, session: Session) -> tuple[int, run_pb2.ExpertNotice] | None:
    """Return when what notice was given; None for another message, or one that does not verify."""
    with suppress(Invalid):
        fact = verify_fact(record, session.roster)
        if isinstance(fact.message, run_pb2.ExpertNotice):
            return fact.time_unix_ms, fact.message
    return None


def _say(shelf: Shelf, notices: list[tuple[int, run_pb2.ExpertNotice]]) -> None:
    """Repeat on the shelf what was said about its experts and about sources of data, once."""
    repeated = {(event.kind, event.subject, event.time_unix_ms) for event in shelf.events()}
    for at, notice in notices:
        kind = _SAID.get(notice.kind, "")
        here = kind.startswith("opted") or shelf.path(notice.subject).is_dir()
        if kind and here and (kind, notice.subject, at) not in repeated:
            shelf.state(kind, notice.subject, notice.reason, at)


async def shelve(
    shelf: Shelf,
    said: ExpertSummary | run_pb2.ExpertDeposited,
    record: ExpertRecord,
    fetch: Callable[[ArtifactRef], Awaitable[Path]],
    at_unix_ms: int,
    attestation: str | None,
) -> None:
    """Put what a platform's library holds, an expert or a whole model, onto a shelf."""
    if not said.files:
        await asyncio.to_thread(shelf.deposit, await fetch(said.expert), record, at_unix_ms, attestation)
        return
    with tempfile.TemporaryDirectory() as scratch:
        files = {ref.digest: await fetch(ref) for ref in said.files}
        for name, entry in record.get("files", {}).items():
            if entry["digest"] not in files:
                raise VerificationFailed(f"the library names no file {name} of {said.expert_id}; tell its operator")
            (Path(scratch) / name).symlink_to(files[entry["digest"]])
        await asyncio.to_thread(shelf.deposit_model, Path(scratch), at_unix_ms, record, attestation)
