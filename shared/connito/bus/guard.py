"""A key's share of connections (docs/adr/0054-a-share-of-connections.md).

The server limits what a connection may do, and how many all keys of an account have; none of its limits is for a key. It does
say who connects, and closes what it is told to close.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

from connito.bus.connection import Connection
from connito.bus.offences import report
from connito.bus.permissions import CONNECTED, CONNECTIONS_OF, KICK, SERVERS, SYSTEM
from connito.errors import Retry
from connito.runtime.logs import get_logger
from connito.v1 import reasons_pb2 as reasons
from connito.wire.identity import Identity, short_key
from connito.wire.passes import claims_of
from connito.wire.tls import Tls

log = get_logger("guard")

# Of one key, in one account, at one server: a trainer, a few commands beside it, and what a broken line has left behind.
SHARE = 16
PAGE = 256
ANSWERS_SECONDS = 1.0
AGAIN_SECONDS = 1.0


class Place(NamedTuple):
    """One key, in one account, at one server."""

    server: str
    account: str
    key: str


class Guard:
    """Closes what a stranger's key opens beyond its share, the newest first.

    Connections are only counted up: at the share they are looked at, and what is found there is the count from then on.
    """

    def __init__(self, url: str, identity: Identity, name: str, tls: Tls) -> None:
        claims = [(token, claims_of(token)) for token in identity.passes]
        self._token = next((token for token, of in claims if of["name"] == SYSTEM), "")
        # Services and the operator are nobody's to count.
        self._own = {str(of["nats"].get("issuer_account", of["iss"])) for _, of in claims}
        self._connection = Connection(url, identity, f"{name} guard", tls, self._token)
        self._seen: Counter[Place] = Counter()
        self._crowded: set[Place] = set()
        self._wake, self._anew = asyncio.Event(), False

    async def watch(self) -> None:
        """Run until cancelled."""
        if not self._token:
            # A broker that lets in by key alone has no accounts, and no strangers.
            if self._own:
                log.warning("connections of one key are not limited; `connito access export` gives a pass for it")
            await asyncio.Event().wait()
        try:
            while True:
                with suppress(Retry):
                    await self._connection.open()
                    break
                await asyncio.sleep(AGAIN_SECONDS)
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
                    self._wake.set()
                    await asyncio.sleep(AGAIN_SECONDS)
        finally:
            await self._connection.close()

    def _start_anew(self) -> None:
        """Who is connected already was not heard of."""
        self._anew = True
        self._wake.set()

    async def _on_connect(self, msg: Any) -> None:
        with suppress(ValueError, LookupError, TypeError):
            said = json.loads(msg.data)
            self._count(Place(said["server"]["id"], said["client"]["acc"], said["client"]["user"]))

    def _count(self, place: Place) -> None:
        if place.account in self._own:
            return
        self._seen[place] += 1
        if self._seen[place] > SHARE:
            self._crowded.add(place)
            self._wake.set()

    async def _look(self) -> None:
        if self._anew:
            self._seen.clear()
            for server in await self._servers():
                await self._count_all(server)
            self._anew = False
        while self._crowded:
            place = self._crowded.pop()
            try:
                await self._thin_out(place)
            except Retry:
                self._crowded.add(place)
                raise

    async def _thin_out(self, place: Place) -> None:
        """Close all but the oldest connections of a key."""
        heard = self._seen[place]
        page = await self._page(place.server, {"user": place.key, "acc": place.account, "sort": "cid"})
        found = sorted(int(one["cid"]) for one in page["connections"])
        for cid in found[SHARE:]:
            # Without somebody who waits for the answer the server does nothing.
            await self._connection.request(KICK.format(server=place.server), json.dumps({"cid": cid}).encode())
        # Who came while it was looked at may be in it or not.
        self._seen[place] += min(SHARE, len(found)) - heard
        if len(found) == PAGE or self._seen[place] > SHARE:
            self._crowded.add(place)
        if closed := len(found[SHARE:]):
            detail = f"more than {SHARE} connections at once; the newest are closed"
            report("connections", key=place.key, reason=reasons.REASON_QUOTA_EXCEEDED, detail=detail)
            log.warning("closed connections of one key", security=True, key=short_key(place.key), closed=closed)

    async def _count_all(self, server: str) -> None:
        offset = 0
        while connections := (await self._page(server, {"offset": offset, "sort": "cid"}))["connections"]:
            for one in connections:
                self._count(Place(server, str(one.get("account")), str(one.get("authorized_user"))))
            offset += len(connections)

    async def _page(self, server: str, asked: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps({"auth": True, "limit": PAGE, **asked}).encode()
        answer = json.loads((await self._connection.request(CONNECTIONS_OF.format(server=server), body)).data)
        if "data" not in answer:
            raise Retry(f"the broker does not tell its connections: {answer.get('error')}", dependency="broker")
        page: dict[str, Any] = answer["data"]
        return page | {"connections": page.get("connections") or []}

    async def _servers(self) -> list[str]:
        """Return the servers of the cluster. Each answers for itself; there is no telling how many will."""
        nc, inbox = self._connection.nc, self._connection.nc.new_inbox()
        found: list[str] = []

        async def take(msg: Any) -> None:
            found.append(str(json.loads(msg.data)["id"]))

        subscription = await nc.subscribe(inbox, cb=take)
        await nc.publish(SERVERS, b"", reply=inbox)
        await asyncio.sleep(ANSWERS_SECONDS)
        await subscription.unsubscribe()
        return found
