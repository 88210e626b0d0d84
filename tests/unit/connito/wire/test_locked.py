"""Locked files: one key, one content, in order and whole, and nothing of it before the key is told."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from connito.errors import Invalid
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_SUBMISSION, ArtifactRef
from connito.wire.locked import is_key, lock_file, locked_bytes, unlocked
from connito.wire.sealing import CHUNK, CHUNK_TAG

WORK, KEY = b"rows of experts" * 100, bytes(range(32))


def locked(folder: Path, work: bytes = WORK, key: bytes = KEY) -> tuple[Path, ArtifactRef]:
    content = hashlib.sha256(work).hexdigest()
    (folder / "work").write_bytes(work)
    lock_file(folder / "work", path := folder / "locked", key, content)
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    return path, ArtifactRef(digest=digest, size=len(raw), realm=REALM_SUBMISSION, key=key, content=content)


def test_a_false_key_for_the_same_upload_leaves_what_was_opened(tmp_path: Path) -> None:
    path, ref = locked(tmp_path)
    clear = unlocked(path, ref, tmp_path)
    false = ArtifactRef(digest=ref.digest, key=bytes(32), content=ref.content)
    assert refused(path, false, tmp_path)
    assert clear.read_bytes() == WORK


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7])
def test_the_key_opens_it_and_without_it_nothing_is_read(tmp_path: Path, size: int) -> None:
    work = (WORK * (size // len(WORK) + 1))[:size]
    path, ref = locked(tmp_path, work)
    assert path.stat().st_size == locked_bytes(size)
    assert size < 32 or work[:32] not in path.read_bytes()
    (tmp_path / "work").unlink()
    clear = unlocked(path, ref, tmp_path)
    assert clear.read_bytes() == work
    assert (clear.stat().st_mode | path.stat().st_mode) & 0o077 == 0


def test_what_tells_no_key_is_taken_as_it_is(tmp_path: Path) -> None:
    path, ref = locked(tmp_path)
    assert unlocked(path, ArtifactRef(digest=ref.digest), tmp_path) == path


def refused(path: Path, ref: ArtifactRef, folder: Path) -> bool:
    with pytest.raises(Invalid) as error:
        unlocked(path, ref, folder)
    return error.value.reason == reasons_pb2.REASON_KEY_MISMATCH


@pytest.mark.parametrize(
    "change",
    [{"key": bytes(32)}, {"key": KEY[:-1]}, {"key": KEY + b"x"}, {"content": "0" * 64}, {"content": ""}],
)
def test_another_key_or_content_is_the_miners_own_fault(tmp_path: Path, change: dict[str, object]) -> None:
    path, ref = locked(tmp_path)
    told = ArtifactRef(**{"digest": ref.digest, "key": ref.key, "content": ref.content, **change})  # type: ignore[arg-type]
    assert refused(path, told, tmp_path)


@pytest.mark.parametrize(
    "bend",
    [
        lambda raw: raw[:10],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: raw[: 50 + CHUNK + CHUNK_TAG],
        lambda raw: raw[:50] + raw[50 + CHUNK + CHUNK_TAG :],
        lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
        lambda raw: raw[:30] + bytes([raw[30] ^ 1]) + raw[31:],
        lambda raw: raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:],
        lambda _: b"",
        lambda _: WORK,
    ],
)
def test_no_part_of_it_can_be_bent_cut_or_moved(tmp_path: Path, bend: object) -> None:
    path, ref = locked(tmp_path, WORK * 800)
    path.write_bytes(bend(path.read_bytes()))  # type: ignore[operator]
    assert refused(path, ref, tmp_path)


def test_one_upload_has_one_key(tmp_path: Path) -> None:
    """Else who chose at the reveal which of two keys to tell would choose its work after all others had committed."""
    path, ref = locked(tmp_path)
    first, other = path.read_bytes(), bytes(32)
    locked(tmp_path, WORK, other)
    forged = path.read_bytes()[:50] + first[50:]
    path.write_bytes(forged)
    assert refused(path, ArtifactRef(digest=ref.digest, key=other, content=ref.content), tmp_path)
    assert refused(path, ref, tmp_path)


@pytest.mark.parametrize(
    ("key", "content", "is_one"),
    [
        (KEY, "a" * 64, True),
        (KEY, "", False),
        (b"", "a" * 64, False),
        (KEY[1:], "a" * 64, False),
        (KEY, "A" * 64, False),
        (KEY, "../../" + "a" * 58, False),
    ],
)
def test_what_a_key_is(key: bytes, content: str, is_one: bool) -> None:
    assert is_key(ArtifactRef(key=key, content=content)) is is_one
