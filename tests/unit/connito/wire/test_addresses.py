"""Addresses of brokers as operators write them, rightly and wrongly."""

from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.wire.addresses import broker_addresses


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        ("nats://127.0.0.1:4222", ["nats://127.0.0.1:4222"]),
        ("127.0.0.1:4222", ["nats://127.0.0.1:4222"]),
        ("one:4222, tls://two:4222,", ["nats://one:4222", "tls://two:4222"]),
        ("nats://[::1]:4222", ["nats://[::1]:4222"]),
        ("broker", ["nats://broker"]),
        ("wss://somebody:secret@broker.example", ["wss://somebody:secret@broker.example"]),
    ],
)
def test_addresses_are_read(text: str, addresses: list[str]) -> None:
    assert broker_addresses(text) == addresses


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1:4222:x",
        "nats://",
        "http://broker:4222",
        "nats://host:99999",
        "host:0",
        "a host:4222",
        "nats://[::1:4222",
        ":4222",
    ],
)
def test_what_is_no_address_is_named(text: str) -> None:
    with pytest.raises(Invalid, match=r"is not the address of a broker; it looks like nats://host:4222"):
        broker_addresses(f"nats://good:4222,{text}")


@pytest.mark.parametrize("text", ["", " , "])
def test_none_is_said(text: str) -> None:
    with pytest.raises(Invalid, match="no address"):
        broker_addresses(text)
