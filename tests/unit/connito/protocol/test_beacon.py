from __future__ import annotations

import pytest
from connito.errors import Invalid
from connito.protocol.beacon import draw_seed, opens, secret_digest
from connito.v1 import reasons_pb2

SECRETS = {"UA": b"a" * 32, "UB": b"b" * 32}


def test_the_seed_depends_on_every_secret_and_not_on_the_order() -> None:
    seed = draw_seed("r", 1, SECRETS)
    assert len(seed) == 32
    assert draw_seed("r", 1, dict(reversed(SECRETS.items()))) == seed
    for validator in SECRETS:
        assert draw_seed("r", 1, {**SECRETS, validator: b"c" * 32}) != seed
        assert draw_seed("r", 1, {v: s for v, s in SECRETS.items() if v != validator}) != seed
    assert draw_seed("r", 2, SECRETS) != seed
    assert draw_seed("s", 1, SECRETS) != seed
    assert draw_seed("r", 1, {"UA": SECRETS["UB"], "UB": SECRETS["UA"]}) != seed


def test_a_secret_opens_its_own_commitment_only() -> None:
    digest = secret_digest("r", 1, "UA", SECRETS["UA"])
    assert opens(digest, "r", 1, "UA", SECRETS["UA"])
    assert not opens(digest, "r", 1, "UB", SECRETS["UA"])
    assert not opens(digest, "r", 2, "UA", SECRETS["UA"])
    assert not opens(digest, "r", 1, "UA", SECRETS["UB"])
    assert not opens(digest, "r", 1, "UA", b"")


def test_short_secrets_and_empty_draws_are_refused() -> None:
    with pytest.raises(Invalid, match="16 to 64"):
        secret_digest("r", 1, "UA", b"short")
    with pytest.raises(Invalid) as raised:
        draw_seed("r", 1, {})
    assert raised.value.reason == reasons_pb2.REASON_NO_QUORUM
