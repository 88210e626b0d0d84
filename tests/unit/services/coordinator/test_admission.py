"""What counts as one caller at the door."""

from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.v1 import reasons_pb2
from connito.wire.roster import Roster

from services.coordinator.admission import Admission, neighbourhood


@pytest.mark.parametrize(
    ("peer", "caller"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7"),
        ("ipv4:192.0.2.7:4712", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:80", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:ffff::1]:80", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:1", "192.0.2.7"),
        ("ipv6:[fe80::1%25eth0]:1", "fe80::/64"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        ("", ""),
    ],
)
def test_a_caller_is_an_address_or_a_network(peer: str, caller: str) -> None:
    assert neighbourhood(peer) == caller


def test_without_the_operators_seeds_nobody_is_admitted() -> None:
    with pytest.raises(Invalid, match="ask the operator") as caught:
        Admission(None, "", Roster({})).knock("ipv4:192.0.2.7:1")
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED
