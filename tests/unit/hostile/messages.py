"""Protobuf messages with anything in them, as Hypothesis strategies: what a stranger with a key can sign."""

from __future__ import annotations

from typing import Any, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_SINT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_SINT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.TYPE_ENUM: (-(2**31), 2**31 - 1),
}
_TEXT = st.text(max_size=40) | st.sampled_from(
    ["", "r1", ">", "*", "a.b", "..", "0" * 64, "f" * 64, "²", "\x00", "U" * 56]
)
_BYTES = st.binary(max_size=80) | st.sampled_from([b"", b"s" * 32, b"x" * 10_000])


def messages(kind: type[Message], **fixed: Any) -> st.SearchStrategy[Any]:
    """Messages of a type with any fields set; `fixed` ones as given."""
    fields = {name: st.just(value) for name, value in fixed.items()}
    other = {f.name: _field(f) for f in cast(Descriptor, kind.DESCRIPTOR).fields if f.name not in fixed}
    return st.fixed_dictionaries(fields, optional=other).map(lambda values: kind(**values))


def _field(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    entry: Descriptor | None = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        return st.dictionaries(_TEXT, _TEXT, max_size=3)
    nested = entry is not None and entry == field.containing_type
    value = st.deferred(lambda: _value(field)) if nested else _value(field)
    return st.lists(value, max_size=3) if field.is_repeated else value


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        return messages(GetMessageClass(cast(Descriptor, field.message_type)))
    if field.type == FieldDescriptor.TYPE_STRING:
        return _TEXT
    if field.type == FieldDescriptor.TYPE_BYTES:
        return _BYTES
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return st.floats()
    low, high = _RANGES[field.type]
    return st.integers(low, high) | st.sampled_from([0, 1, 2, high])
