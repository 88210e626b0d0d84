"""Tell a message that is gone from one that a replica has not yet: a direct get is answered by any of the replicas."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence

from connito.bus.connection import Connection
from connito.errors import Invalid, Retry
from connito.wire.fact import Record
from connito.wire.parts import read_part
from connito.wire.roster import Roster

_NO_SUCH_MESSAGE = 10037
# Strangers can ask no leader: what replicas have not after so many looks is gone.
LAG_SECONDS, STRANGERS_LOOKS = 0.5, 20


async def gone(connection: Connection, stream: str, which: Mapping[str, object]) -> bool:
    """Return whether there is no such message by the word of the stream's leader. Raises `Retry` when none answers."""
    reply = await connection.request(f"$JS.API.STREAM.MSG.GET.{stream}", json.dumps(which).encode())
    error = json.loads(reply.data).get("error")
    if error is not None and error.get("err_code") != _NO_SUCH_MESSAGE:
        raise Retry(f"the broker cannot read {which} of {stream}: {error.get('description')}", dependency="broker")
    return error is not None


async def parts_at(
    look: Callable[..., Awaitable[Record | None]],
    connection: Connection,
    record: Record,
    places: Sequence[str],
    roster: Roster | None,
) -> list[bytes]:
    """Return the parts that a fact lies in, waiting for a replica that has them all. Raises `Invalid` where one is gone."""
    for looks in itertools.count(1):
        parts = {place: await look(record.stream, last_by_subj=place) for place in places}
        absent = [place for place, part in parts.items() if part is None]
        if not absent:
            break
        by_leader = {"last_by_subj": absent[0]}
        if looks == STRANGERS_LOOKS if connection.stranger else await gone(connection, record.stream, by_leader):
            raise Invalid(f"{record.subject} lacks {len(absent)} of its {len(places)} parts")
        await asyncio.sleep(LAG_SECONDS)
    return [read_part(part, roster) for part in parts.values() if part is not None]
