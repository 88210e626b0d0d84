"""Lending what is sealed to a key that was admitted since: a run's hold-outs and secret, secrets of experts without a run."""

from __future__ import annotations

from contextlib import suppress

from connito.errors import Invalid, NotFound, ObjectMissing, VerificationFailed
from connito.platform.log import read_log
from connito.platform.session import Session
from connito.protocol.entitlement import of_deposit
from connito.runtime.tasks import blocking
from connito.store import ArtifactStore
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity, is_public_key
from connito.wire.private import READERS
from connito.wire.sealing import JUDGES, MEDIA_TYPE, NoKey, lend, lend_bytes
from connito.wire.subjects import LIBRARY
from connito.workloads.fetching import holdout_refs


def boxes(session: Session, run: str, reader: str) -> dict[str, str]:
    """Return by digest the boxes with which a validator opens the hold-outs of a run, and it or another service what a run that
    is not public made. `run` is `library` for experts that no run made, such as compositions: those that this key opens.
    Raises `Invalid`, `NotFound`.
    """
    roles = [role for role in READERS if is_public_key(reader) and session.roster.permits(role, reader)]
    if not roles:
        raise Invalid(f"{reader[:80]} is no validator of the roster; `connito access export --validators` admits one")
    return blocking(_boxes(session, run, reader, {*roles} & {*JUDGES}))


async def _boxes(session: Session, run: str, reader: str, judges: set[str]) -> dict[str, str]:
    async with session.bus() as bus:
        log = await read_log(bus, session.roster, run)
    store, me = session.store(), session.identity
    if run == LIBRARY:
        return await _derived(log.runs.get(run), store, me, reader)
    spec = log.runs[run].spec if run in log.runs else None
    if spec is None:
        raise NotFound(f"the log has no run {run!r}; `connito job list` shows the runs")
    held = holdout_refs(spec).values() if judges else ()
    refs = [ref for ref in (*held, spec.secret) if ref.media_type == MEDIA_TYPE]
    return {ref.digest: lend(await store.fetch(ref), me, reader) for ref in refs}


async def _derived(facts: RunFacts | None, store: ArtifactStore, me: Identity, reader: str) -> dict[str, str]:
    """Return the boxes for what customers derived from experts, as far as `me` opens it; what was withdrawn is there too."""
    deposits = facts.deposits.values() if facts is not None else ()
    named = {ref.secret for deposit in deposits for ref in of_deposit(deposit.message)}
    found = dict[str, str]()
    for secret in sorted(named - {""}):
        with suppress(NoKey, ObjectMissing, VerificationFailed):
            found[secret] = lend_bytes(await store.sealed_secret(secret), me, reader)
    if not found:
        raise NotFound("the library has no private expert without a run that this key opens; nothing is lent")
    return found
