"""Lending what a run has sealed, its hold-outs and its secret, to a key that was admitted after the run began."""

from __future__ import annotations

from connito.errors import Invalid, NotFound
from connito.platform.log import read_log
from connito.platform.session import Session
from connito.runtime.tasks import blocking
from connito.wire.identity import is_public_key
from connito.wire.private import READERS
from connito.wire.sealing import JUDGES, MEDIA_TYPE, lend
from connito.workloads.fetching import holdout_refs


def boxes(session: Session, run: str, reader: str) -> dict[str, str]:
    """Return by digest the boxes with which a validator opens the hold-outs of a run, and it or another service what a run that
    is not public made. Raises `Invalid`, `NotFound`.
    """
    roles = [role for role in READERS if is_public_key(reader) and session.roster.permits(role, reader)]
    if not roles:
        raise Invalid(f"{reader[:80]} is no validator of the roster; `connito access export --validators` admits one")
    return blocking(_boxes(session, run, reader, {*roles} & {*JUDGES}))


async def _boxes(session: Session, run: str, reader: str, judges: set[str]) -> dict[str, str]:
    async with session.bus() as bus:
        log = await read_log(bus, session.roster, run)
    spec = log.runs[run].spec if run in log.runs else None
    if spec is None:
        raise NotFound(f"the log has no run {run!r}; `connito job list` shows the runs")
    held = holdout_refs(spec).values() if judges else ()
    refs = [ref for ref in (*held, spec.secret) if ref.media_type == MEDIA_TYPE]
    store = session.store()
    return {ref.digest: lend(await store.fetch(ref), session.identity, reader) for ref in refs}
