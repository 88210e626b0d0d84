"""Bounds of what participants put into messages: stated in `proto/`, enforced wherever a message of theirs is taken in.

Without them one validator's words, copied into a verdict, or one miner's media type, copied into a settlement, could make a
fact of the platform's too large to be written, and its run stand still.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from connito.errors import Invalid
from connito.v1 import bounds_pb2, reasons_pb2

# What a library says about bytes that it could not read, and the name of what it is about, quotes the sender.
WORDS_BYTES, NAME_BYTES = 400, 120


class Bound(NamedTuple):
    """The bounds of one field; 0: none. `inside`: its message has bounded fields of its own."""

    name: str
    size: int
    entries: int
    repeated: bool
    inside: bool


@cache
def bounds_of(descriptor: Descriptor) -> tuple[Bound, ...]:
    """Return the bounded fields of a type of message, and those in which something is bounded."""
    found = []
    for field in descriptor.fields:
        options = field.GetOptions().Extensions
        size, entries = options[bounds_pb2.max_bytes], options[bounds_pb2.max_entries]
        # A message whose size is bounded needs no look inside, and one that holds its own kind could not have one.
        nested = field.type == FieldDescriptor.TYPE_MESSAGE and not size and field.message_type is not descriptor
        inside = nested and bool(bounds_of(field.message_type))
        if size or entries or inside:
            found.append(Bound(field.name, size, entries, field.is_repeated, inside))
    return tuple(found)


def check_bounds(message: Message) -> None:
    """Raise `Invalid` (OVERSIZED) naming the field that is over its bound."""
    for bound in bounds_of(message.DESCRIPTOR):
        value = getattr(message, bound.name)
        if bound.entries and len(value) > bound.entries:
            raise _over(message, bound, f"{len(value)} entries", bound.entries)
        for one in value if bound.repeated else (value,):
            if bound.size and (size := _size(one)) > bound.size:
                raise _over(message, bound, f"{size} bytes", bound.size)
            if bound.inside:
                check_bounds(one)


def cut(text: str, size: int) -> str:
    """Return the beginning of a text, of at most `size` bytes."""
    data = text.encode(errors="replace")
    return text if len(data) <= size else data[: size - 3].decode(errors="ignore") + "…"


def _size(value: str | bytes | Message) -> int:
    if isinstance(value, Message):
        return value.ByteSize()
    return len(value.encode()) if isinstance(value, str) else len(value)


def _over(message: Message, bound: Bound, found: str, limit: int) -> Invalid:
    return Invalid(
        f"{message.DESCRIPTOR.name}.{bound.name} has {found}, over the limit of {limit}",
        reason=reasons_pb2.REASON_OVERSIZED,
    )
