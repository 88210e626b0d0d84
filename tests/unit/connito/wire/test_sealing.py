"""Sealed files: read by those that they are for, and by nobody who holds the store, copies the file or bends a part of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from connito.errors import Invalid, VerificationFailed
from connito.v1 import reasons_pb2
from connito.v1.artifacts_pb2 import REALM_HOLDOUT, ArtifactRef
from connito.wire import sealing
from connito.wire.identity import Identity
from connito.wire.roster import Roster
from connito.wire.sealing import CHUNK, MEDIA_TYPE, judges, lend, parse_boxes, seal_file, unsealed
from nacl.public import SealedBox

CLINIC, JUDGE, SECOND, MINER, MALLORY = (Identity.generate(bytes([n]) * 32) for n in range(1, 6))
TEXT = b"held-out text of a clinic" * 50


def sealed(folder: Path, text: bytes = TEXT, owner: Identity = CLINIC) -> tuple[Path, ArtifactRef]:
    (folder / "plain").write_bytes(text)
    seal_file(folder / "plain", path := folder / "sealed", owner, [JUDGE.public, SECOND.public])
    return path, ref_of(path)


def ref_of(path: Path) -> ArtifactRef:
    raw = path.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    return ArtifactRef(digest=digest, size=len(raw), media_type=MEDIA_TYPE, realm=REALM_HOLDOUT)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 7])
def test_readers_and_owner_read_it_and_nothing_of_it_lies_in_the_file(tmp_path: Path, size: int) -> None:
    text = (TEXT * (size // len(TEXT) + 1))[:size]
    path, ref = sealed(tmp_path, text)
    for reader in (CLINIC, JUDGE, SECOND):
        opened = unsealed(path, ref, reader, CLINIC.public)
        assert opened.read_bytes() == text
        assert opened.stat().st_mode & 0o077 == 0
    assert size < 32 or text[:32] not in path.read_bytes()


def test_sealing_again_gives_the_same_bytes_and_for_others_other_ones(tmp_path: Path) -> None:
    first = sealed(tmp_path)[0].read_bytes()
    assert sealed(tmp_path)[0].read_bytes() == first
    seal_file(tmp_path / "plain", tmp_path / "other", CLINIC, [JUDGE.public])
    assert (tmp_path / "other").read_bytes()[-32:] != first[-32:]
    assert sealed(tmp_path, owner=MALLORY)[0].read_bytes()[-32:] != first[-32:]


def test_the_boxes_are_what_any_library_opens_as_sealed_boxes(tmp_path: Path) -> None:
    path, _ = sealed(tmp_path)
    with path.open("rb") as file:
        boxes = json.loads(sealing._read_header(file))["boxes"]
    keys = {
        SealedBox(reader.exchange_key).decrypt(bytes.fromhex(boxes[reader.public]))
        for reader in (JUDGE, SECOND, CLINIC)
    }
    assert len(keys) == 1


@pytest.mark.parametrize("outsider", [MINER, MALLORY, None])
def test_nobody_else_reads_it(tmp_path: Path, outsider: Identity | None) -> None:
    path, ref = sealed(tmp_path)
    with pytest.raises(Invalid) as caught:
        unsealed(path, ref, outsider, CLINIC.public)
    assert caught.value.reason == reasons_pb2.REASON_NOT_PERMITTED
    assert list(tmp_path.glob("*.open")) == []


def test_a_copy_in_another_customers_run_is_not_judged(tmp_path: Path) -> None:
    path, ref = sealed(tmp_path)
    unsealed(path, ref, JUDGE, CLINIC.public)
    with pytest.raises(Invalid, match="another than this run's customer"):
        unsealed(path, ref, JUDGE, MALLORY.public)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(CLINIC.public.encode(), MALLORY.public.encode()))
    with pytest.raises(VerificationFailed):
        unsealed(path, ref_of(path), JUDGE, MALLORY.public)


def test_every_bent_byte_is_noticed(tmp_path: Path) -> None:
    path, _ = sealed(tmp_path, TEXT[:100])
    raw = path.read_bytes()
    for place in range(0, len(raw), 7):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises((Invalid, VerificationFailed)):
            unsealed(path, ref_of(path), JUDGE, CLINIC.public)


@pytest.mark.parametrize("cut", ["last chunk", "order", "tail", "nothing", "header only"])
def test_what_is_cut_or_put_in_another_order_is_noticed(tmp_path: Path, cut: str) -> None:
    path, _ = sealed(tmp_path, bytes(3 * CHUNK))
    raw = path.read_bytes()
    start = len(raw) - 3 * (CHUNK + 16)
    chunks = [raw[start + n * (CHUNK + 16) : start + (n + 1) * (CHUNK + 16)] for n in range(3)]
    bent = {
        "last chunk": raw[:start] + chunks[0] + chunks[1],
        "order": raw[:start] + chunks[1] + chunks[0] + chunks[2],
        "tail": raw + chunks[2],
        "nothing": b"",
        "header only": raw[:start],
    }[cut]
    path.write_bytes(bent)
    with pytest.raises(VerificationFailed):
        unsealed(path, ref_of(path), JUDGE, CLINIC.public)


def test_all_readers_see_that_one_of_them_was_cheated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A customer who lets only one validator read would otherwise make the others look absent."""
    real = sealing._box
    with monkeypatch.context() as cheating:
        cheating.setattr(sealing, "_box", lambda key, to: real(b"x" * 32 if to == SECOND.public else key, to))
        path, ref = sealed(tmp_path)
    with pytest.raises(VerificationFailed, match="not all given the same key"):
        unsealed(path, ref, JUDGE, CLINIC.public)
    with pytest.raises(VerificationFailed):
        unsealed(path, ref, SECOND, CLINIC.public)


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"{}", b'{"owner": 1, "boxes": {}}', b'{"owner": "x", "boxes": {"y": "z"}}', b"\xff"]
)
def test_a_header_that_is_none_is_a_damaged_file(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(sealing._MAGIC + len(header).to_bytes(4, "big") + header + b"rest")
    with pytest.raises(VerificationFailed, match="sealed file is damaged"):
        unsealed(path, ref_of(path), JUDGE, CLINIC.public)


def test_what_is_not_sealed_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "plain"
    path.write_bytes(TEXT)
    assert unsealed(path, ArtifactRef(media_type="application/octet-stream"), None, "") == path


def test_those_who_judge_and_the_customer_read_it_and_no_miner_or_librarian() -> None:
    roster = Roster(
        {
            role: frozenset({role})
            for role in ("selector", "aggregator", "validator", "library", "coordinator", "operator")
        }
    )
    assert judges(roster, "customer") == {"customer", "selector", "aggregator", "validator", "operator"}


def test_a_reader_lends_it_to_one_who_came_later_and_to_nobody_else(tmp_path: Path) -> None:
    path, ref = sealed(tmp_path)
    late, other = Identity.generate(b"late".ljust(32)), Identity.generate(b"other".ljust(32))
    for giver in (CLINIC, JUDGE, SECOND):
        boxes = {ref.digest: lend(path, giver, late.public)}
        assert unsealed(path, ref, late, CLINIC.public, boxes).read_bytes() == TEXT
        with pytest.raises(VerificationFailed, match="does not open"):
            unsealed(path, ref, other, CLINIC.public, boxes)
    with pytest.raises(Invalid, match="was not admitted then"):
        lend(path, late, other.public)
    with pytest.raises(Invalid, match="another than this run's customer"):
        unsealed(path, ref, late, MALLORY.public, boxes)


@pytest.mark.parametrize("box", ["00", "zz", "", "00" * 80, "a key of another file"])
def test_a_box_that_is_not_of_this_file_opens_nothing(box: str, tmp_path: Path) -> None:
    path, ref = sealed(tmp_path)
    (tmp_path / "b").mkdir()
    elsewhere, _ = sealed(tmp_path / "b", b"something else")
    late = Identity.generate(b"late".ljust(32))
    lent = lend(elsewhere, CLINIC, late.public) if box.startswith("a key") else box
    with pytest.raises((Invalid, VerificationFailed)):
        unsealed(path, ref, late, CLINIC.public, {ref.digest: lent})
    # What a reader was given when the file was made counts before what somebody lends it.
    assert unsealed(path, ref, JUDGE, CLINIC.public, {ref.digest: lent}).read_bytes() == TEXT


@pytest.mark.parametrize("data", [b"", b"[]", b'{"a": 1}', b"\xff", b"[" * 100_000, b"null"])
def test_a_file_of_boxes_is_one_or_is_refused(data: bytes) -> None:
    with pytest.raises(Invalid, match="access lend"):
        parse_boxes(data, "it")
    assert parse_boxes(b'{"a": "00"}', "it") == {"a": "00"}
