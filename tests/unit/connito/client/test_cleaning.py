"""What a message names: in whatever field, or nothing that is still needed would be collected."""

from __future__ import annotations

import pytest
from connito.client.cleaning import references
from connito.v1.artifacts_pb2 import ArtifactRef
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
