from __future__ import annotations

from pathlib import Path

import nkeys
import pytest
from connito.errors import Invalid
from connito.wire import identity
from connito.wire.identity import SIGNATURE_TAG, Identity, is_public_key, verify
from hypothesis import given
from hypothesis import strategies as st

ALICE, BOB = Identity.generate(b"a" * 32), Identity.generate(b"b" * 32)


def test_what_is_printed_of_an_identity_holds_no_secret() -> None:
    assert ALICE.public in repr(ALICE)
    assert ALICE.seed not in repr(ALICE)


def test_reproducible_from_entropy_and_different_without() -> None:
    assert Identity.generate(b"a" * 32).public == ALICE.public
    assert Identity.generate().public != Identity.generate().public


def test_the_key_is_a_plain_nkey() -> None:
    pair = nkeys.from_seed(bytearray(ALICE.seed.encode()))
    assert pair.public_key.decode() == ALICE.public
    assert bytes(pair.sign(b"login")) == ALICE.sign_nonce(b"login")


@given(st.binary(max_size=200))
def test_a_signature_holds_for_its_signer_and_message_only(message: bytes) -> None:
    signature = ALICE.sign(message)
    assert verify(ALICE.public, message, signature)
    assert not verify(BOB.public, message, signature)
    assert not verify(ALICE.public, message + b"x", signature)
    assert not verify(ALICE.public, message, signature[:-1] + bytes([signature[-1] ^ 1]))


@pytest.mark.parametrize(
    "public", ["", "U", "not a key", ALICE.public[:-1], ALICE.public[:-1] + "A", ALICE.seed, "Ü" * 56]
)
def test_malformed_keys_are_not_valid_and_do_not_raise(public: str) -> None:
    assert not is_public_key(public)
    assert not verify(public, b"m", ALICE.sign(b"m"))


def test_what_was_signed_here_is_read_back_without_a_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    signature, looks = ALICE.sign(b"own"), list[bytes]()

    def look(public: str, text: bytes, signature: bytes) -> bool:
        looks.append(text)
        return False

    monkeypatch.setattr(identity, "verify_text", look)
    assert verify(ALICE.public, b"own", signature)
    assert not looks
    for public, message in ((ALICE.public, b"other"), (BOB.public, b"own")):
        assert not verify(public, message, signature)
    assert not verify(ALICE.public, b"own", b"x" * 64)
    assert len(looks) == 3


@pytest.mark.parametrize("signature", [b"", b"short", b"x" * 63, b"x" * 65])
def test_malformed_signatures_are_not_valid(signature: bytes) -> None:
    assert not verify(ALICE.public, b"m", signature)


def test_a_login_challenge_can_not_be_turned_into_a_signature() -> None:
    with pytest.raises(Invalid, match="refusing"):
        ALICE.sign_nonce(SIGNATURE_TAG + b"transfer everything")


def test_saved_for_the_owner_only_and_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "alice"
    ALICE.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load(path) == ALICE


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="nothing-here"):
        Identity.load(tmp_path / "nothing-here")


@pytest.mark.parametrize(
    "seed", ["", "SU", "hello", ALICE.seed[:-2], ALICE.seed[:20] + "A" + ALICE.seed[21:], ALICE.public]
)
def test_a_damaged_seed_is_refused(seed: str) -> None:
    with pytest.raises(Invalid, match="seed"):
        Identity.from_seed(seed)


def test_derived_secrets_depend_on_key_and_on_where_words_end() -> None:
    assert ALICE.derive("salt", "run", "1") == ALICE.derive("salt", "run", "1")
    assert len({ALICE.derive("ab", "c"), ALICE.derive("a", "bc"), ALICE.derive("abc"), BOB.derive("ab", "c")}) == 4
