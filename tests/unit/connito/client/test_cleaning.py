"""What a message names: in whatever field, or nothing that is still needed would be collected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from connito.client import cleaning
from connito.client.cleaning import collect, references
from connito.store.named import StoredObject, key_of
from connito.v1.artifacts_pb2 import REALM_PRIVATE, REALM_PUBLIC, ArtifactRef
from connito.v1.run_pb2 import SelectionMade
from connito.wire.sealing import NoKey
from connito.wire.verification import CATALOGUE, INGRESS
from google.protobuf.message import Message

KINDS = sorted({kind for kind, *_ in CATALOGUE.values()} | set(INGRESS.values()), key=lambda kind: kind.__name__)


def fill(message: Message, above: tuple[object, ...] = ()) -> int:
    """Put one reference into every field that takes one, however deep; return how many."""
    count = 0
    for field in message.DESCRIPTOR.fields:
        kind = field.message_type
        if kind is None or kind in above or kind.GetOptions().map_entry:
            continue
        held = getattr(message, field.name)
        one = held.add() if field.is_repeated else held
        if isinstance(one, ArtifactRef):
            one.digest = f"{len(above)}-{field.name}"
            count += 1
        else:
            one.SetInParent()
            count += fill(one, (*above, message.DESCRIPTOR))
    return count


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_reference_is_overlooked(kind: type[Message]) -> None:
    message = kind()
    count = fill(message)
    assert len(list(references(message))) == count
    assert not list(references(kind()))


def test_facts_do_name_artifacts() -> None:
    assert sum(fill(kind()) for kind in KINDS) > 15


async def test_what_a_run_made_under_a_secret_that_is_closed_here_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report names its statistics inside; an operator whose key came later cannot read it, and must not remove them."""
    report = ArtifactRef(digest="a" * 64, size=9, media_type="application/json", realm=REALM_PRIVATE, secret="5" * 64)
    statistics = ArtifactRef(digest="b" * 64, realm=REALM_PRIVATE, secret=report.secret)
    nobodys = ArtifactRef(digest="c" * 64, realm=REALM_PUBLIC)
    removed = []

    class Store:
        async def objects(self) -> list[StoredObject]:
            return [StoredObject(key_of(ref), ref.digest, 9, 1e9, "") for ref in (report, statistics, nobodys)]

        async def get_bytes(self, ref: ArtifactRef) -> bytes:
            raise NoKey("it was sealed for others")

        async def media_type(self, _: str) -> str:
            return ""

        async def remove(self, key: str, _: float) -> None:
            removed.append(key)

    class Bus:
        async def stored(self, *_: object) -> AsyncIterator[object]:
            yield object()

    async def log(*_: object, **__: object) -> Any:
        return SimpleNamespace(runs={})

    async def none(*_: object) -> list[str]:
        return []

    fact = SimpleNamespace(run="r", key=SimpleNamespace(section="run", cycle=0), message=SelectionMade(report=report))
    monkeypatch.setattr(cleaning, "_verified", lambda *_: fact)
    monkeypatch.setattr(cleaning, "read_log", log)
    monkeypatch.setattr(cleaning, "stray_runs", none)
    done: Any = await collect(Bus(), Store(), None, remove=True)  # type: ignore[arg-type]
    assert removed == [key_of(nobodys)]
    assert len(done.kept) == 2
