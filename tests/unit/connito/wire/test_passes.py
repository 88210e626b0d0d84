"""Passes and those who sign them."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.errors import Invalid
from connito.wire import passes
from connito.wire.identity import Identity
from connito.wire.passes import JOINT, Authority, admitted, claims_of, parse
from connito.wire.roster import Roster

KEY, OTHER = (Identity.generate(bytes([n]) * 32) for n in (1, 2))
SIGNER, STRANGER = (Authority.generate(passes.ACCOUNT) for _ in range(2))


def signed(by: Authority = SIGNER, key: Identity = KEY, kind: str = "user", name: str = "miners-say") -> str:
    return by.sign(key.public, name, kind, {"issuer_account": "A"}, 1)


def test_a_pass_says_whom_it_is_for_and_who_signed_it() -> None:
    claims = claims_of(signed())
    assert (claims["sub"], claims["iss"], claims["name"], claims["iat"]) == (
        KEY.public, SIGNER.public, "miners-say", 1
    )  # fmt: skip


def test_a_key_is_admitted_by_those_who_admit() -> None:
    assert admitted(signed(), KEY.public, {SIGNER.public})
    assert admitted(signed(), KEY.public, {STRANGER.public, SIGNER.public})


def tampered() -> dict[str, str]:
    head, claims, signature = signed().split(".")
    other = signed(key=OTHER).split(".")
    return {
        "of another key": signed(key=OTHER),
        "by somebody else": signed(STRANGER),
        "of an account": signed(kind="account"),
        "another's signature": f"{head}.{claims}.{other[2]}",
        "another's claims": f"{head}.{other[1]}.{signature}",
        "no signature": f"{head}.{claims}.",
        "a broken signature": f"{head}.{claims}.!!",
        "nothing": "",
        "no token": "x.y.z",
        "a long one": "x" * 100_000,
    }


@pytest.mark.parametrize("what", tampered())
def test_nothing_else_admits(what: str) -> None:
    assert not admitted(tampered()[what], KEY.public, {SIGNER.public})


def test_nobody_is_admitted_by_nobody() -> None:
    assert not admitted(signed(), KEY.public, set())


def test_passes_are_handed_over_as_one_word_and_kept_in_the_key_file(tmp_path: Path) -> None:
    tokens = (signed(), signed(name="miners-read"))
    assert parse(JOINT.join(tokens) + "\n", KEY.public) == tokens
    assert parse(f"{tokens[0]}\n{tokens[1]}\n", KEY.public) == tokens
    KEY.with_passes(tokens).save(tmp_path / "key.nk")
    read = Identity.load(tmp_path / "key.nk")
    assert (read, read.passes) == (KEY, tokens)
    assert (tmp_path / "key.nk").stat().st_mode & 0o777 == 0o600
    KEY.save(tmp_path / "bare.nk")
    assert Identity.load(tmp_path / "bare.nk").passes == ()


@pytest.mark.parametrize("text", ["", "x", "a.b.c", "~", signed() + "~" + signed() + "~" + signed(), "x" * 5000])
def test_what_is_no_pass_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="this is not a pass; copy all of what the operator gave you"):
        parse(text, KEY.public)


def test_anothers_pass_is_named_as_such() -> None:
    with pytest.raises(Invalid, match=f"this pass is for {OTHER.public}, and the key is {KEY.public}"):
        parse(signed(key=OTHER), KEY.public)


def test_a_seed_that_is_none_is_refused(tmp_path: Path) -> None:
    for seed in ("", "SU", KEY.seed[:-1]):
        with pytest.raises(Invalid, match="not the seed"):
            Authority.from_seed(seed)
    with pytest.raises(Invalid, match="cannot read"):
        Authority.load(tmp_path / "none.nk")
    SIGNER.save(tmp_path / "a" / "signer.nk")
    assert Authority.load(tmp_path / "a" / "signer.nk") == SIGNER


def test_a_roster_says_who_admits(tmp_path: Path) -> None:
    roster = Roster(admits={SIGNER.public})
    roster.save(tmp_path / "roster.json")
    assert Roster.load(tmp_path / "roster.json").admits == {SIGNER.public}
    other = Roster()
    other.replace(roster)
    assert other.admits == {SIGNER.public}
