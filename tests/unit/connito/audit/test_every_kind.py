"""Nothing that can be said or stored is out of an auditor's sight: every kind of message and artifact there is.

The lists come from the catalogue and from the wire contract, so a new kind is tried, or missed here by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from connito.audit import chain
from connito.audit.evidence import signatures
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.fact import Record
from connito.wire.verification import ANY, CATALOGUE, INGRESS
from google.protobuf.descriptor import Descriptor

from tests.unit.connito.audit.world import MINERS, RUN, VALIDATORS, World, tell

# Said of an expert once its run has ended: a new one does not make another run of it, so the chain leaves them out.
AFTERWARDS = {("library", "notice"), ("library", "used"), ("library", "archived")}
KINDS = [*sorted(CATALOGUE), *(("ingress", kind) for kind in sorted(INGRESS))]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


def kind_of(record: Record) -> tuple[str, str]:
    parts = record.subject.split(".")[3:]
    return ("ingress", parts[2]) if parts[0] == "ingress" else (parts[0], parts[2])


def index_of(world: World, kind: tuple[str, str]) -> int:
    """The first message of a kind; one that the story does not have is written at its end, with what its subject needs."""
    found = [i for i, record in enumerate(world.records) if kind_of(record) == kind]
    if not found:
        section, name = kind
        message_type, role, path = CATALOGUE[kind]
        cycle = 0 if section in ("run", "library") else 1
        message = message_type()
        own = role in ("validator", ANY)
        who = VALIDATORS["1"] if own else MINERS["A"]
        for field, value in (("run", RUN), ("cycle", cycle), ("service", "validator"), (path.split("+")[0], who)):
            if field in message_type.DESCRIPTOR.fields_by_name:
                setattr(message, field, value)
        id_ = "" if not path else f"{who}-0" if "+" in path else who
        world.publish(section, cycle, name, message, id_, who if own else role)
        found = [len(world.records) - 1]
    return found[0]


@pytest.mark.parametrize("kind", KINDS, ids=".".join)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_byte_in_a_message_is_found_and_named(told: World, kind: tuple[str, str], place: float) -> None:
    world = told.copy()
    index = index_of(world, kind)
    assert signatures(world.evidence()).differences == ()
    record = world.records[index]
    world.flip(index, int(len(record.data) * place))
    found = signatures(world.evidence()).differences
    assert [difference.where for difference in found] == [
        f"{record.subject.split('.', 3)[-1]} ({record.stream} {record.sequence})"
    ]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in AFTERWARDS], ids=".".join)
def test_a_message_that_was_signed_again_breaks_the_chain_in_its_window(told: World, kind: tuple[str, str]) -> None:
    """Whatever the change, be it only to what nothing can be recomputed from."""
    world = told.copy()
    index = index_of(world, kind)
    before = chain.windows_of(world.records)
    subject = world.records[index].subject.split(".", 3)[-1]
    type_ = INGRESS[kind[1]] if kind[0] == "ingress" else CATALOGUE[kind][0]
    world.resign(subject, lambda message: None, type_)
    assert world.records[index].data != told.records[index].data if index < len(told.records) else True
    parts = subject.split(".")
    window = f"{parts[0]}.{parts[1]}" if parts[0] in ("train", "commit", "submit", "validate", "merge") else parts[0]
    assert chain.first_break(chain.windows_of(world.records), before) == window


def references(descriptor: Descriptor, path: str, seen: tuple[str, ...] = ()) -> Iterator[str]:
    """Paths of every `ArtifactRef` within a message type."""
    for field in descriptor.fields:
        inner = field.message_type
        if inner is None or inner.full_name in seen:
            continue
        here = f"{path}.{field.name}"
        if inner.full_name == ArtifactRef.DESCRIPTOR.full_name:
            yield here
        else:
            yield from references(inner, here, (*seen, inner.full_name))


def values(message: Any, path: list[str]) -> Iterator[ArtifactRef]:
    if not path:
        yield message
        return
    value, field = getattr(message, path[0]), message.DESCRIPTOR.fields_by_name[path[0]]
    for entry in value if field.is_repeated else [value]:
        yield from values(entry, path[1:])


PATHS = sorted(
    {
        path
        for type_, _, _ in CATALOGUE.values()
        for path in references(cast(Descriptor, type_.DESCRIPTOR), type_.__name__)
    }
)


def test_the_contract_is_walked_through() -> None:
    assert {"RunCreated.spec.base.manifest", "VersionPublished.state", "ExpertDeposited.record"} <= set(PATHS)


def told_with(told: World, path: str) -> tuple[World, set[str]]:
    """The run and the digests that it has at a path; where the story has none, one is put there and signed."""
    type_, _, rest = path.partition(".")
    fields, world = rest.split("."), told.copy()
    facts = [f for f in told.evidence().facts.facts.values() if type(f.message).__name__ == type_]
    digests = {ref.digest for f in facts for ref in values(f.message, fields)} - {""}
    if digests:
        return world, digests
    made = world.upload(b"what " + path.encode())

    def add(message: Any) -> None:
        for field in fields[:-1]:
            message = getattr(message, field)
            message = message.add() if hasattr(message, "add") else message
        named = getattr(message, fields[-1])
        named.append(made) if hasattr(named, "append") else named.CopyFrom(made)

    key = facts[0].key
    subject = ".".join(part for part in (key.section, str(key.cycle), key.kind, key.id) if part)
    world.resign(subject, add, type(facts[0].message))
    return world, {made.digest}


@pytest.mark.parametrize("path", PATHS)
async def test_every_artifact_that_a_fact_can_name_is_hashed(told: World, tmp_path: Path, path: str) -> None:
    """And where one byte of it is another one, that is found by what it is."""
    whole, digests = told_with(told, path)
    for digest in sorted(digests):
        world = whole.copy()
        data = bytearray(world.objects[digest])
        data[len(data) // 2] ^= 1
        world.objects[digest] = bytes(data)
        artifacts = await world.artifacts(tmp_path)
        assert any(digest[:12] in difference.where for difference in artifacts.step().differences)
