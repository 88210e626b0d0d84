"""One leader at a time: a key in a bucket whose entries expire, renewed by compare-and-swap."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from nats.errors import Error as NatsError
from nats.js.errors import BucketNotFoundError, KeyNotFoundError, KeyWrongLastSequenceError

from connito.bus import Bus
from connito.bus.streams import LEASE_TTL, LEASES
from connito.errors import Retry
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import WAITING

log = get_logger("lease")

# So many terms an entry may stand as it is: who holds it renews it three times in each.
OVERDUE = 1.5


class Lease:
    """`async with Lease(bus, "coordinator") as lease:` blocks until this process is the leader.

    `revision` numbers the terms: whoever leads later has a larger one. `held` turns false and `lost` is set when the
    lease could not be renewed in time, measured on this side's clock from before the last renewal was sent, so it is
    never believed for longer than the broker grants it. `ttl` must be the bucket's (see `connito.bus.streams`), or less.
    """

    def __init__(self, bus: Bus, name: str, ttl: float = LEASE_TTL, token: bytes = b"") -> None:
        self._bus, self.name, self.ttl = bus, name, ttl
        self._what = f"lease of {name}"
        self.revision = 0
        self.lost = asyncio.Event()
        # Tells our own entry from that of a replica with the same key; one of before is taken over.
        self._token = token or token_of(bus)
        self._last = 0
        # The entry of another that was seen last, and when it was seen first.
        self._seen = (0, 0.0)
        self._good_until = 0.0
        self._renewing: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """Return whether this process leads, right now."""
        return self.revision > 0 and not self.lost.is_set() and self._bus.host.monotonic() < self._good_until

    async def __aenter__(self) -> Self:
        waiting = False
        while not await self._try_acquire():
            if not waiting:
                log.info("another replica leads, standing by", lease=self.name)
                waiting = True
            await asyncio.sleep(self.ttl / 12)
        self.revision = self._last
        self._renewing = asyncio.create_task(self._renew())
        metrics.LEADER.labels(self.name).set(1)
        log.info("leading", lease=self.name, revision=self.revision)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._renewing is not None
        await end_tasks([self._renewing])
        metrics.LEADER.labels(self.name).set(0)
        if self.held:
            # Give it back, so that the next leader need not wait for the expiry.
            with suppress(NatsError, OSError, asyncio.TimeoutError, Retry):
                await (await self._bucket()).delete(self.name, last=self._last)
        self._good_until = 0.0

    async def _bucket(self) -> Any:
        return await self._bus.js.key_value(LEASES)

    async def _try_acquire(self) -> bool:
        asked = self._bus.host.monotonic()
        try:
            if not await self._write(None):
                WAITING.end(self._what)
                return False
        except BucketNotFoundError:
            log.warning("the broker has no lease bucket; run `connito streams ensure`", lease=self.name)
            await asyncio.sleep(1.0)
            return False
        except (TimeoutError, NatsError, OSError) as error:
            log.warning("cannot ask for the lease, trying again", lease=self.name, error=str(error))
            problem = Retry(f"the broker does not grant this service its lease: {error}", dependency="broker")
            WAITING.begin(self._what, problem, "", 0.5)
            await asyncio.sleep(0.5)
            return False
        WAITING.end(self._what)
        self._good_until = asked + self.ttl
        return True

    async def _write(self, last: int | None) -> bool:
        """Write the entry where there is none, or over our own at `last`; False when somebody else's stands there.

        Ours it is as well where the acknowledgement of an earlier write was lost, or a term of ours was. Raises what the client
        library raises.
        """
        bucket = await self._bucket()
        try:
            if last is None:
                self._last = await bucket.create(self.name, self._token)
            else:
                self._last = await bucket.update(self.name, self._token, last=last)
        except KeyWrongLastSequenceError:
            try:
                entry = await bucket.get(self.name)
                if entry.value != self._token and not self._is_overdue(entry.revision):
                    return False
                # Written anew: what stands there may be about to expire.
                self._last = await bucket.update(self.name, self._token, last=entry.revision)
            except (KeyNotFoundError, KeyWrongLastSequenceError):
                return False
        return True

    def _is_overdue(self, revision: int) -> bool:
        """Return whether another's entry was not renewed in time. The broker counts its age by a clock that may have been set
        back, and would let the entry of one that is gone stand for as long.
        """
        now = self._bus.host.monotonic()
        if revision != self._seen[0]:
            self._seen = revision, now
        return now - self._seen[1] > OVERDUE * self.ttl

    async def _renew(self) -> None:
        """Renew three times per ttl; give up when it is over or someone else has it.

        What was renewed too late is lost too: meanwhile nothing was decided here, and nobody would decide it again.
        """
        while True:
            await asyncio.sleep(self.ttl / 3)
            asked = self._bus.host.monotonic()
            try:
                async with asyncio.timeout(max(0.05, self._good_until - asked)):
                    if not await self._write(self._last):
                        return self._lose("someone else took it, or it expired")
                if self._bus.host.monotonic() >= self._good_until:
                    return self._lose("renewed too late")
                self._good_until = asked + self.ttl
            except (NatsError, OSError, TimeoutError) as error:
                if self._bus.host.monotonic() >= self._good_until:
                    return self._lose(f"not renewed in time: {str(error) or type(error).__name__}")
                await asyncio.sleep(0.05)

    def _lose(self, why: str) -> None:
        log.error("lost the lease", lease=self.name, revision=self.revision, why=why)
        metrics.LEADER.labels(self.name).set(0)
        metrics.LEASE_LOST.labels(self.name).inc()
        self._good_until = 0.0
        self.lost.set()


def token_of(bus: Bus) -> bytes:
    """Return what tells the entries of one holder from those of all others, with the same key too."""
    return f"{bus.identity.public}.{bus.host.entropy(8).hex()}".encode()


class LeaseKeeper:
    """Stand by for a lease, and again whenever it is lost."""

    def __init__(self, bus: Bus, name: str, seconds: float = LEASE_TTL) -> None:
        self._bus, self._name, self._seconds = bus, name, seconds
        # One for all terms: a broker that elects loses us the lease, and would make us wait until our own entry expires.
        self._token = token_of(bus)
        self._lease: Lease | None = None

    @property
    def leading(self) -> bool:
        """Tell whether this process leads, right now."""
        return self._lease is not None and self._lease.held

    async def keep(self, begin: Callable[[], Awaitable[None]]) -> None:
        """Acquire the lease, run `begin`, and start over when the lease is lost; until cancelled."""
        while True:
            async with Lease(self._bus, self._name, self._seconds, self._token) as lease:
                self._lease = lease
                try:
                    await begin()
                    await lease.lost.wait()
                finally:
                    self._lease = None
