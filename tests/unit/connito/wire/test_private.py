"""Encrypted artifacts: what opens, what does not, and what a copy without keys notices."""

from __future__ import annotations

import hashlib
import io

import pytest
from connito.errors import ObjectDamaged
from connito.v1.artifacts_pb2 import REALM_PRIVATE, REALM_PUBLIC, ArtifactRef
from connito.v1.run_pb2 import RunSpec
from connito.wire import private
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.sealing import CHUNK

SECRET, VALUE = hashlib.sha256(b"sealed").hexdigest(), bytes(range(32))


def ref_of(data: bytes, secret: str = SECRET) -> ArtifactRef:
    return ArtifactRef(digest=hashlib.sha256(data).hexdigest(), size=len(data), realm=REALM_PRIVATE, secret=secret)


def stored(data: bytes, secret: str = SECRET) -> bytes:
    ref = ref_of(data, secret)
    return private.closed(io.BytesIO(data), secret, private.key_of_content(VALUE, ref.digest)).read()


def clear(raw: bytes, ref: ArtifactRef, value: bytes = VALUE) -> bytes:
    return private.opened(io.BytesIO(raw).read, ref, private.key_of_content(value, ref.digest)).read()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 17])
def test_it_opens_to_the_same_and_its_length_follows(size: int) -> None:
    data = bytes(size // 2) + b"\x07" * (size - size // 2)
    raw = stored(data)
    assert clear(raw, ref_of(data)) == data
    assert (len(raw), private.content_bytes(len(raw))) == (private.stored_bytes(size), size)
    assert raw == stored(data), "the same content gives the same bytes, so that storing again is storing once"
    assert private.whole(io.BytesIO(raw).read)
    assert size < 64 or data[:64] not in raw


@pytest.mark.parametrize("at", [0, 25, 60, -33, -1])
def test_a_changed_byte_is_noticed_with_the_key_and_without(at: int) -> None:
    data = b"tensors" * 1000
    raw = bytearray(stored(data))
    raw[at] ^= 1
    assert not private.whole(io.BytesIO(bytes(raw)).read)
    if -33 < at < 0:
        return  # The hash at the end is for copies; who has the key does not need it.
    with pytest.raises(ObjectDamaged):
        clear(bytes(raw), ref_of(data))


def test_another_secret_another_content_or_the_end_cut_off_does_not_open() -> None:
    data = b"tensors" * 1000
    raw, ref = stored(data), ref_of(data)
    with pytest.raises(ObjectDamaged):
        clear(raw, ref, bytes(32))
    with pytest.raises(ObjectDamaged):
        clear(raw, ref_of(data, "0" * 64))
    with pytest.raises(ObjectDamaged):
        clear(raw, ref_of(b"other"))
    with pytest.raises(ObjectDamaged):
        clear(raw[:-40], ref)
    assert not private.whole(io.BytesIO(raw[:-40]).read)


def test_a_key_is_for_one_artifact_and_one_reader() -> None:
    me, other = Identity.generate(), Identity.generate()
    key = private.key_of_content(VALUE, ref_of(b"a").digest)
    box = private.boxed(key, me.public)
    assert private.unboxed(box, me) == key != private.key_of_content(VALUE, ref_of(b"b").digest)
    assert private.unboxed(box, other) == private.unboxed(b"", me) == b""


def test_where_a_run_puts_what_it_makes_follows_from_its_spec() -> None:
    assert private.placed(RunSpec()) == ArtifactRef(realm=REALM_PUBLIC)
    spec = RunSpec(secret=ArtifactRef(digest=SECRET))
    assert private.placed(spec) == ArtifactRef(realm=REALM_PRIVATE, secret=SECRET)


def test_the_secret_is_for_those_who_work_on_the_run() -> None:
    roster = Roster(
        {role: frozenset({role}) for role in ("selector", "library", "customer", "committer", "coordinator")}
    )
    assert private.readers(roster, "owner") == {"owner", "selector", "library", "committer"}
