"""Find the message whose handling ends the process.

Nothing is noted of a message that comes for the first time. While one is handled that was delivered before, a note at the broker
says so: where it still stands when the message comes again, a process has ended in between. Many are handled at once, and any
of them may have been the cause, or none; so from then on each of them is handled with nothing beside it, and the one with
which a process ends again and again is put aside. What was merely under way is handled like that once, and its note is gone.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from connito.bus.connection import Connection
from connito.bus.streams import SUSPECTS
from connito.errors import Fatal, Invalid, Retry, Unusable
from connito.runtime.logs import get_logger
from connito.v1 import reasons_pb2 as reasons

log = get_logger("bus.suspects")

# Ends of a process while one message was handled alone.
DEATHS = 2


class SetAside(Invalid):
    """A message is not handled any more, since its handler never comes to an end."""


class Suspects:
    """`async with suspects.watch(sequence, again):` around everything that handling a message does."""

    def __init__(self, connection: Connection, durable: str) -> None:
        self._connection, self._durable = connection, durable
        self._turn, self._idle, self._busy = asyncio.Lock(), asyncio.Event(), 0
        self._idle.set()
        # Messages whose handling ended here, and whose note could not be taken back.
        self._innocent: set[int] = set()

    @asynccontextmanager
    async def watch(self, sequence: int, again: bool) -> AsyncIterator[None]:
        """Handle a message inside, alone where it is suspected. `again`: it was delivered before.

        Raises `SetAside` for one with which `DEATHS` processes ended, `Retry` when no note can be read or written.
        """
        deaths = await self._deaths(sequence) if again else None
        if deaths is not None and deaths >= DEATHS:
            what = f"its handling ended the process {deaths} times while nothing else was handled"
            raise SetAside(what, reason=reasons.REASON_FAULT)
        async with self._in_turn(alone=deaths is not None):
            if not again:
                yield
                return
            await self._note(sequence, b"0" if deaths is None else str(deaths + 1).encode())
            try:
                yield
            finally:
                await self._clear(sequence)

    @asynccontextmanager
    async def _in_turn(self, alone: bool) -> AsyncIterator[None]:
        async with self._turn:
            if alone:
                await self._idle.wait()
                yield
                return
            self._busy += 1
            self._idle.clear()
        try:
            yield
        finally:
            self._busy -= 1
            if not self._busy:
                self._idle.set()

    async def _deaths(self, sequence: int) -> int | None:
        """Return how often a process ended while a message was handled alone; None for one that is not suspected."""
        if sequence in self._innocent:
            return None
        subject = self._subject(sequence)
        try:
            found = await self._connection.request(f"$JS.API.DIRECT.GET.KV_{SUSPECTS}.{subject}", b"")
        except Unusable as error:
            log.warning("a pass of an earlier version: who ends the process is not looked for", error=str(error))
            return None
        stands = "Nats-Subject" in (found.headers or {}) and found.data
        return int(found.data) if stands else None

    async def _note(self, sequence: int, note: bytes) -> None:
        try:
            reply = await self._connection.request(self._subject(sequence), note)
        except Unusable:
            return
        if problem := json.loads(reply.data).get("error"):
            raise Retry(f"the broker cannot note a suspect: {problem.get('description', '')}", dependency="broker")
        self._innocent.discard(sequence)

    async def _clear(self, sequence: int) -> None:
        self._innocent.add(sequence)
        try:
            await self._note(sequence, b"")
        except (Retry, Fatal) as error:
            log.warning("cannot take a note back", sequence=sequence, error=str(error))

    def _subject(self, sequence: int) -> str:
        return f"$KV.{SUSPECTS}.{self._durable}.{sequence}"
