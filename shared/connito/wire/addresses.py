"""Addresses of brokers, as people write them."""

from __future__ import annotations

from urllib.parse import urlsplit

from connito.errors import Invalid

_SCHEMES = ("nats", "tls", "ws", "wss")


def broker_addresses(text: str) -> list[str]:
    """Return the addresses in `nats://one:4222,two:4222`, each with its scheme. Raises `Invalid` naming what is none."""
    found = [_address(part.strip()) for part in text.split(",") if part.strip()]
    if not found:
        raise Invalid("no address of a broker is given; it looks like nats://host:4222 (CONNITO_NATS_URL)")
    return found


def _address(text: str) -> str:
    whole = text if "://" in text else f"nats://{text}"
    try:
        split = urlsplit(whole)
        right = (
            split.scheme in _SCHEMES and bool(split.hostname) and split.port != 0 and not set(whole) & set(" \t\r\n")
        )
    except ValueError:
        right = False
    if not right:
        raise Invalid(
            f"{text!r} is not the address of a broker; it looks like nats://host:4222, several separated by commas "
            "(CONNITO_NATS_URL)"
        )
    return whole
