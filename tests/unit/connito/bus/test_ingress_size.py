"""What a miner may say fits into what the broker takes of it, with room, and not much more does."""

from __future__ import annotations

import pytest
from connito.bus.streams import STREAMS
from connito.wire.bounds import bounds_of
from connito.wire.envelope import seal
from connito.wire.identity import Identity
from connito.wire.subjects import ingress
from connito.wire.verification import INGRESS
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

NUMBERS = (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_UINT64)


def largest(kind: type[Message]) -> Message:
    """The largest message of a kind that its bounds let pass."""
    message, bounds = kind(), {bound.name: bound.size for bound in bounds_of(kind.DESCRIPTOR)}
    for field in kind.DESCRIPTOR.fields:
        if field.type in NUMBERS:
            setattr(message, field.name, 2**32 - 1)
        elif field.type == FieldDescriptor.TYPE_DOUBLE:
            setattr(message, field.name, 1.5)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).media_type = "x" * bounds[field.name]
        else:
            assert bounds[field.name], f"{kind.DESCRIPTOR.name}.{field.name} has a bound"
            size = bounds[field.name]
            setattr(message, field.name, bytes(size) if field.type == FieldDescriptor.TYPE_BYTES else "x" * size)
    return message


@pytest.mark.parametrize("kind", INGRESS)
def test_the_largest_message_takes_a_quarter_of_what_is_stored(kind: str) -> None:
    miner = Identity.generate()
    size = seal(miner, ingress("r", miner.public, kind), largest(INGRESS[kind])).ByteSize()
    assert 4 * size <= STREAMS["INGRESS"].max_message_bytes <= 16 * 1024
