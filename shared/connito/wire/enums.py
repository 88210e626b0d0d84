"""Names of enum values that may be newer than this side, or made up: proto3 enums are open."""

from __future__ import annotations

from typing import Any

from connito.v1 import reasons_pb2 as reasons


def name_of(enum: Any, value: int) -> str:
    """Return the name of a value of a generated enum; `REASON_999` for one that the enum does not have."""
    found = enum.DESCRIPTOR.values_by_number.get(value)
    prefix = enum.DESCRIPTOR.values_by_number[0].name.rpartition("_")[0]
    return str(found.name) if found is not None else f"{prefix}_{value}"


def plain_name(enum: Any, value: int) -> str:
    """Return the name of a value as people read it: `GATE_DECISION_TOP_1` is `top-1`."""
    prefix = enum.DESCRIPTOR.values_by_number[0].name.rpartition("_")[0]
    return name_of(enum, value).removeprefix(f"{prefix}_").lower().replace("_", "-")


def reason_name(reason: reasons.Reason.ValueType) -> str:
    """Return `REASON_LATE_REVEAL` as people see it: `late-reveal`; the empty string for none."""
    if reason == reasons.REASON_UNSPECIFIED:
        return ""
    return plain_name(reasons.Reason, reason)
