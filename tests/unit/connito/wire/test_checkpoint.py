"""Heads and cosignatures against RFC 6962 and the C2SP texts (signed-note, tlog-checkpoint, tlog-cosignature), read anew here.

Nothing in the oracle below comes from the product: the tree is the recursive definition of the RFC, with its proofs of
consistency; notes are taken apart by the rules of the specification, and signatures are checked with PyNaCl.
"""

from __future__ import annotations

import base64
import hashlib

import pytest
from connito.errors import Invalid
from connito.wire.checkpoint import Checkpoint, cosignature, cosigned_at
from connito.wire.fact import Record
from connito.wire.heads import LogTree, leaf_of
from connito.wire.identity import Identity
from connito.wire.merkle import Tree, leaf_hash
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

LOG, WITNESS = Identity.generate(b"l" * 32), Identity.generate(b"w" * 32)


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\x00" + leaves[0]).digest()
    k = split(len(leaves))
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def split(n: int) -> int:
    """The largest power of two smaller than n."""
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def proof(m: int, leaves: list[bytes], whole: bool = True) -> list[bytes]:
    """RFC 6962, 2.1.2: SUBPROOF(m, D[n], b)."""
    n = len(leaves)
    if m == n:
        return [] if whole else [mth(leaves)]
    k = split(n)
    if m <= k:
        return [*proof(m, leaves[:k], whole), mth(leaves[k:])]
    return [*proof(m - k, leaves[k:], False), mth(leaves[:k])]


def consistent(m: int, n: int, old: bytes, new: bytes, path: list[bytes]) -> bool:
    """RFC 9162, 2.1.4.2: verify that a tree of n leaves extends one of m."""
    if m == n:
        return old == new and not path
    if m & (m - 1) == 0:
        path = [old, *path]
    fn, sn = m - 1, n - 1
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    fr = sr = path[0]
    for c in path[1:]:
        if sn == 0:
            return False
        if fn & 1 or fn == sn:
            fr = hashlib.sha256(b"\x01" + c + fr).digest()
            sr = hashlib.sha256(b"\x01" + c + sr).digest()
            while fn & 1 == 0 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            sr = hashlib.sha256(b"\x01" + sr + c).digest()
        fn, sn = fn >> 1, sn >> 1
    return (fr, sr, sn) == (old, new, 0)


def key_of(nkey: str) -> bytes:
    """The 32 bytes of an nkey: base32 of a prefix byte, the key and two bytes of checksum."""
    return base64.b32decode(nkey)[1:33]


def note_of(text: str) -> tuple[str, list[tuple[str, bytes]]]:
    """signed-note: text that ends in a newline, an empty line, and signature lines `— name base64`."""
    body, _, below = text.partition("\n\n")
    lines = below.splitlines()
    assert all(line.startswith("\u2014 ") for line in lines)
    return body + "\n", [(name, base64.b64decode(data)) for _, name, data in (line.split(" ") for line in lines)]


def holds(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        VerifyKey(key).verify(message, signature)
    except BadSignatureError:
        return False
    return True


@pytest.mark.parametrize("size", [*range(20), 63, 64, 65, 100])
def test_the_root_is_that_of_the_rfc(size: int) -> None:
    leaves, tree = [bytes([i]) * (i % 5) for i in range(size)], Tree()
    for leaf in leaves:
        tree.append(leaf_hash(leaf))
    assert (tree.size, tree.root) == (size, mth(leaves))


def test_every_head_is_consistent_with_every_earlier_one() -> None:
    leaves, tree, roots = [bytes([i]) for i in range(33)], Tree(), [Tree().root]
    for leaf in leaves:
        tree.append(leaf_hash(leaf))
        roots.append(tree.root)
    for n in range(1, len(roots)):
        for m in range(1, n + 1):
            path = proof(m, leaves[:n])
            assert consistent(m, n, roots[m], roots[n], path)
            if m < n:
                assert not consistent(m, n, roots[m][::-1], roots[n], path)


def test_a_checkpoint_is_read_and_verified_by_the_specification() -> None:
    checkpoint = Checkpoint("connito.v1/demo/5f", 7, b"r" * 32).signed(LOG).cosigned(WITNESS, 1_700_000_000)
    text, signatures = note_of(checkpoint.note)
    assert text == "connito.v1/demo/5f\n7\n" + base64.b64encode(b"r" * 32).decode() + "\n"
    (log, signed), (witness, stamped) = signatures
    assert log == "connito.v1/demo/5f"
    assert signed[:4] == hashlib.sha256(log.encode() + b"\n\x01" + key_of(LOG.public)).digest()[:4]
    assert holds(key_of(LOG.public), text.encode(), signed[4:])
    assert witness == WITNESS.public
    assert stamped[:4] == hashlib.sha256(witness.encode() + b"\n\x04" + key_of(WITNESS.public)).digest()[:4]
    assert int.from_bytes(stamped[4:12], "big") == 1_700_000_000
    assert holds(key_of(WITNESS.public), b"cosignature/v1\ntime 1700000000\n" + text.encode(), stamped[12:])
    again = Checkpoint.parse(checkpoint.note)
    assert again == checkpoint
    assert again.is_signed_by(LOG.public)
    assert not again.is_signed_by(WITNESS.public)
    assert again.cosigners() == {WITNESS.public: 1_700_000_000}


GOOD = Checkpoint("connito.v1/demo/5f", 7, b"r" * 32).signed(LOG).note


@pytest.mark.parametrize(
    "note",
    [
        "", "\n\n", GOOD[:-1], GOOD + "\n", GOOD.replace("\n7\n", "\n07\n"), GOOD.replace("\n7\n", "\n-7\n"),
        GOOD.replace("\n7\n", "\n7\nextension\n"), GOOD.replace("— ", "- "), GOOD.replace("cnJy", "cnJ"),
        GOOD.replace("=\n\n", "=\n"), GOOD + "— x y\u00e9\n", "\n" + GOOD, GOOD * 1000,
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_is_refused(note: str) -> None:
    with pytest.raises(Invalid, match="not a checkpoint"):
        Checkpoint.parse(note)


def test_no_signature_holds_for_another_text_time_key_or_name() -> None:
    one, other = (Checkpoint(f"log{i}", 7, b"r" * 32) for i in range(2))
    line = cosignature(one, WITNESS, 5)
    assert cosigned_at(one, WITNESS.public, line) == 5
    assert not cosigned_at(other, WITNESS.public, line)
    assert not cosigned_at(one, LOG.public, line)
    assert not cosigned_at(one, WITNESS.public, line[:-4] + "AAAA")
    assert not cosigned_at(one, WITNESS.public, "— x")
    moved = Checkpoint(other.origin, 7, other.root, one.signed(LOG).lines)
    assert not moved.is_signed_by(LOG.public)
    own = Checkpoint(one.origin, 8, one.root, one.signed(LOG).lines)
    assert not own.is_signed_by(LOG.public)


def test_a_login_challenge_cannot_be_made_into_a_checkpoint() -> None:
    text = Checkpoint("log", 7, b"r" * 32).text.encode()
    for challenge in (text, b"cosignature/v1\ntime 5\n" + text):
        with pytest.raises(Invalid, match="challenge"):
            WITNESS.sign_nonce(challenge)
    with pytest.raises(Invalid):
        WITNESS.sign_text(b"connito.v1.signature\x00\n")


def test_a_leaf_binds_place_time_subject_and_bytes() -> None:
    record = Record("RUNS", 3, "connito.v1.r.run.0.created", b"data", 17)
    fields = [b"RUNS", b"3", b"17", b"connito.v1.r.run.0.created", b"data"]
    joined = b"".join(len(part).to_bytes(4, "big") + part for part in fields)
    assert leaf_of(record) == hashlib.sha256(b"\x00" + joined).digest()


def test_a_tree_takes_a_message_once_and_in_order() -> None:
    tree = LogTree()
    for sequence in (1, 2, 2, 1, 3):
        tree.add(Record("RUNS", sequence, "connito.v1.r.run.0.created", b"", 0))
    tree.add(Record("INGRESS", 1, "connito.v1.r.ingress.U.trained", b"", 0))
    from connito.wire.facts import RunFacts

    assert Checkpoint.parse(tree.head(RunFacts("r"), LOG).checkpoint).size == 3
