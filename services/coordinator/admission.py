"""Passes to the bus for keys that hold an invite, signed here: the broker need not hear of them."""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path
from urllib.parse import unquote

from connito.errors import Invalid
from connito.platform.accounts import Accounts
from connito.runtime.limits import RateLimit
from connito.v1 import reasons_pb2, services_pb2
from connito.wire.roster import Roster

# An address has this many newcomers at once, and then one every so often.
BURST, PER_SECOND = 100.0, 1.0
# An owner of IPv6 addresses has at least so many leading bits of them to itself.
IPV6_BITS = 64


class Admission:
    """`folder` holds accounts.json and accounts/miners-*.nk; without one, nobody is admitted. `bus`: as miners reach it."""

    def __init__(self, folder: Path | None, bus: str, roster: Roster) -> None:
        self._accounts = None if folder is None else Accounts(folder)
        self._bus, self._roster = bus, roster
        self._limit = RateLimit(PER_SECOND, BURST, time.monotonic)

    def knock(self, peer: str) -> None:
        """Count an attempt, before anything is done for it. Raises `Invalid` (NOT_PERMITTED, QUOTA_EXCEEDED)."""
        if self._accounts is None:
            raise Invalid(
                "this coordinator signs no passes; ask the operator for one for your key, or the operator sets "
                "CONNITO_ADMISSION",
                reason=reasons_pb2.REASON_NOT_PERMITTED,
            )
        self._limit.take(neighbourhood(peer))

    def admit(self, key: str, since_ms: int) -> services_pb2.AdmitMinerResponse:
        """Return the passes of a key, and what else it needs. Raises `Invalid` (BANNED) for one that is known as revoked.

        They are dated from when the invite was used: a revocation that has not reached this folder voids them all the same.
        """
        assert self._accounts is not None, "knock comes first"
        if key in self._accounts.revoked:
            raise Invalid(
                f"the operator has revoked {key}; only the operator can admit it again",
                reason=reasons_pb2.REASON_BANNED,
            )
        passes = self._accounts.admit("miner", key, since_ms // 1000)
        return services_pb2.AdmitMinerResponse(passes=passes, roster_json=self._roster.to_json(), bus=self._bus)


def neighbourhood(peer: str) -> str:
    """Return what counts as one caller: an IPv4 address, or a network of IPv6. `peer`: as gRPC writes it, `ipv4:host:port`."""
    host = unquote(peer.partition(":")[2].rpartition(":")[0]).strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return peer
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is None:
        return str(ipaddress.ip_network((address, IPV6_BITS), strict=False))
    return str(getattr(address, "ipv4_mapped", None) or address)
