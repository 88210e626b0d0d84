"""What the coordinator may decide to do, and how it is done."""

from __future__ import annotations

from dataclasses import dataclass

from connito.v1 import cycle_pb2
from google.protobuf.message import Message


@dataclass(frozen=True)
class PublishFact:
    """Write one fact. `fence` is filled in by whoever performs it, under its lease."""

    section: str
    cycle: int
    kind: str
    message: Message


@dataclass(frozen=True)
class CloseWindow:
    """Close a window at the last sequence that `stream` has when this is performed."""

    window: str
    cycle: int
    stream: str
    cause: cycle_pb2.CloseCause.ValueType
