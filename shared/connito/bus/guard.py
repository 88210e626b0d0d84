"""A key's share of connections, and of the broker's patience (docs/adr/0054-a-share-of-connections.md).

The server limits what a connection may do, and how many all keys of an account have; none of its limits is for a key. It does
say who connects, and closes what it is told to close.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from nats.errors import Error as NatsError

from connito.bus.connection import Connection
from connito.bus.offences import report
from connito.bus.permissions import CONNECTED, CONNECTIONS_OF, KICK, SERVERS, SYSTEM
from connito.errors import Invalid, Retry
from connito.runtime.limits import MAX_KEYS
from connito.runtime.logs import get_logger
from connito.v1 import reasons_pb2 as reasons
from connito.wire.identity import Identity
from connito.wire.passes import claims_of
from connito.wire.tls import Tls

log = get_logger("guard")

# Of one key, in one account, at one server: a trainer, a few commands beside it, and what a broken line has left behind.
SHARE = 16
PAGE = 256
ANSWERS_SECONDS = 1.0
AGAIN_SECONDS = 1.0
# So many too much, beyond so many a second: a committer that is kept from its work counts fewer, and tells all the same.
TOO_MUCH, TOLERATED = 400, 100.0
OUT_SECONDS = 60.0
LIE = "a connection that says to be another key than its pass is for; it is closed"
LOUD = f"asks or speaks without end; what it opens is closed for {OUT_SECONDS:.0f} seconds"


class Loud:
    """Tells of a key that does so much that it means it, and again after as much. Times are seconds of any one clock."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell, self._counts = tell, dict[str, tuple[float, float]]()

    def note(self, key: str, now: float) -> None:
        """Count one."""
        count, then = self._counts.pop(key, (0.0, now))
        count = max(0.0, count - (now - then) * TOLERATED) + 1.0
        if len(self._counts) >= MAX_KEYS:
            self._counts.pop(next(iter(self._counts)))
        self._counts[key] = (count if count < TOO_MUCH else 0.0, now)
        if count >= TOO_MUCH:
            self._tell(key)


class Place(NamedTuple):
    """One key, in one account, at one server."""

    server: str
    account: str
    key: str


class Guard:
    """Closes what a stranger's key opens beyond its share, the newest first, and whoever says to be another than its pass.

    Connections are only counted up: at the share they are looked at, and what is found there is the count from then on.
    """

    def __init__(self, url: str, identity: Identity, name: str, tls: Tls) -> None:
        claims = [(token, claims_of(token)) for token in identity.passes]
        self._token = next((token for token, of in claims if of["name"] == SYSTEM), "")
        # Services and the operator are nobody's to count.
        self._own = {str(of["nats"].get("issuer_account", of["iss"])) for _, of in claims}
        self._connect: Callable[[], Connection] = partial(Connection, url, identity, f"{name} guard", tls, self._token)
        self._connection = self._connect()
        self._seen: Counter[Place] = Counter()
        self._crowded: set[Place] = set()
        # What is to be closed: by server and connection there, whose pass it came with, and why.
        self._unwanted: dict[tuple[str, int], tuple[str, str]] = {}
        # Who is shut out, until when, and who was a moment ago.
        self._out: dict[str, float] = {}
        self._outs: set[str] = set()
        self._wake, self._anew = asyncio.Event(), False

    async def watch(self) -> None:
        """Run until cancelled. What fails here is tried again, and ends nothing beside it."""
        if not self._token:
            # A broker that lets in by key alone has no accounts, and no strangers.
            if self._own:
                log.warning("connections of one key are not limited; `connito access export` gives a pass for it")
            await asyncio.Event().wait()
        while True:
            try:
                await self._watch_once()
            except Exception as error:
                log.warning("connections are not limited at the moment", error=str(error) or type(error).__name__)
            finally:
                await self._connection.close()
            await asyncio.sleep(AGAIN_SECONDS)
            self._connection = self._connect()

    def shut_out(self, key: str) -> None:
        """Close what a key has open, and what it opens for a while."""
        self._out = {one: until for one, until in self._out.items() if until > time.monotonic()}
        self._out[key] = time.monotonic() + OUT_SECONDS
        self._outs.add(key)
        self._wake.set()

    async def _watch_once(self) -> None:
        await self._connection.open()
        await self._connection.nc.subscribe(CONNECTED, cb=self._on_connect)
        self._connection.on_reconnect.append(self._start_anew)
        self._start_anew()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._look()
            except Retry as error:
                log.info("cannot look at connections, trying again", error=str(error))
                self._start_anew()
                await asyncio.sleep(AGAIN_SECONDS)

    def _start_anew(self) -> None:
        """Who is connected already was not heard of; a server that came back has another name."""
        self._anew = True
        self._wake.set()

    async def _on_connect(self, msg: Any) -> None:
        with suppress(ValueError, LookupError, TypeError):
            said = json.loads(msg.data)
            who = said["client"]
            self._note(said["server"]["id"], who["acc"], who["id"], who["user"], who.get("jwt", ""))

    def _note(self, server: str, account: str, cid: int, user: str, token: str) -> None:
        """Count a connection. `user` is what the client says of itself; its pass is what the server has checked."""
        if account in self._own:
            return
        if user != (holder := _holder(token)):
            self._close(server, cid, holder, LIE)
        elif time.monotonic() < self._out.get(user, 0.0):
            self._close(server, cid, user, LOUD)
        else:
            self._count(Place(server, account, user))

    def _close(self, server: str, cid: int, holder: str, why: str) -> None:
        self._unwanted[server, int(cid)] = (holder, why)
        self._wake.set()

    def _count(self, place: Place) -> None:
        self._seen[place] += 1
        if self._seen[place] > SHARE:
            self._crowded.add(place)
            self._wake.set()

    async def _look(self) -> None:
        if self._anew:
            self._seen.clear()
            self._crowded.clear()
            self._unwanted.clear()
            for server in await self._servers():
                await self._count_all(server)
            self._anew = False
        while self._outs:
            await self._put_out(self._outs.pop())
        while self._unwanted or self._crowded:
            while self._unwanted:
                (server, cid), (holder, why) = self._unwanted.popitem()
                await self._kick(server, cid)
                report("not_permitted", key=holder, reason=reasons.REASON_NOT_PERMITTED, detail=why)
            if self._crowded:
                await self._thin_out(self._crowded.pop())

    async def _put_out(self, key: str) -> None:
        """Close all connections of a key, which are a page at most, at each server where it was heard of."""
        for server in {place.server for place in self._seen if place.key == key}:
            for one in await self._page(server, {"user": key, "sort": "cid"}):
                if _holder(one.get("jwt", "")) == key:
                    await self._kick(server, int(one["cid"]))
        report("shut_out", key=key, reason=reasons.REASON_QUOTA_EXCEEDED, detail=LOUD)

    async def _thin_out(self, place: Place) -> None:
        """Close all but the oldest connections of a key."""
        heard = self._seen[place]
        page = await self._page(place.server, {"user": place.key, "acc": place.account, "sort": "cid"})
        # Others may say that they are this key.
        found = sorted(int(one["cid"]) for one in page if _holder(one.get("jwt", "")) == place.key)
        for cid in found[SHARE:]:
            await self._kick(place.server, cid)
        # Who came while it was looked at may be in it or not.
        self._seen[place] += min(SHARE, len(found)) - heard
        if len(page) == PAGE or self._seen[place] > SHARE:
            self._crowded.add(place)
        if found[SHARE:]:
            detail = f"more than {SHARE} connections at once; the newest are closed"
            report("connections", key=place.key, reason=reasons.REASON_QUOTA_EXCEEDED, detail=detail)

    async def _kick(self, server: str, cid: int) -> None:
        # Without somebody who waits for the answer the server does nothing.
        await self._connection.request(KICK.format(server=server), json.dumps({"cid": cid}).encode())

    async def _count_all(self, server: str) -> None:
        offset = 0
        while page := await self._page(server, {"offset": offset, "sort": "cid"}):
            for one in page:
                user, token = one.get("authorized_user", ""), one.get("jwt", "")
                self._note(server, one.get("account", ""), one["cid"], user, token)
            offset += len(page)

    async def _page(self, server: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
        body = json.dumps({"auth": True, "limit": PAGE, **asked}).encode()
        answer = json.loads((await self._connection.request(CONNECTIONS_OF.format(server=server), body)).data)
        if "data" not in answer:
            raise Retry(f"the broker does not tell its connections: {answer.get('error')}", dependency="broker")
        return list(answer["data"].get("connections") or ())

    async def _servers(self) -> list[str]:
        """Return the servers of the cluster. Each answers for itself; there is no telling how many will."""
        self._connection.require()
        nc, inbox = self._connection.nc, self._connection.nc.new_inbox()
        found: list[str] = []

        async def take(msg: Any) -> None:
            found.append(str(json.loads(msg.data)["id"]))

        subscription = await nc.subscribe(inbox, cb=take)
        try:
            await nc.publish(SERVERS, b"", reply=inbox)
            await asyncio.sleep(ANSWERS_SECONDS)
        except (NatsError, OSError) as error:
            raise self._connection.explain(error, SERVERS) from error
        finally:
            with suppress(NatsError, OSError):
                await subscription.unsubscribe()
        if not found:
            raise Retry("no server of the broker says that it is there", dependency="broker")
        return found


def _holder(token: str) -> str:
    try:
        return str(claims_of(token)["sub"])
    except Invalid:
        return ""
