"""Offences that were noticed and not reported yet, in this process."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from connito.errors import Invalid
from connito.runtime import metrics
from connito.runtime.limits import RateLimit
from connito.runtime.logs import get_logger
from connito.v1 import reasons_pb2 as reasons
from connito.wire.enums import reason_name
from connito.wire.fact import Record

log = get_logger("offences")

# What a validator may report; services may report more.
KINDS = (
    *("bad_signature", "not_permitted", "banned_key", "quota", "malformed", "denied", "certificate", "false_claim"),
    *("wrong_draw", "wrong_settlement", "squatted_subject", "unexpected_duplicate"),
)
# Beyond so many different (kind, key) at once, only the counters go on.
MAX_WAITING = 256


@dataclass(frozen=True)
class Offence:
    """`count` times the same kind by the same key; subject and detail are the first one's."""

    kind: str
    key: str = ""
    subject: str = ""
    reason: reasons.Reason.ValueType = reasons.REASON_UNSPECIFIED
    detail: str = ""
    count: int = 1


_lines = RateLimit(1.0, 100.0, time.monotonic)
_waiting: dict[tuple[str, str], Offence] = {}


def report(
    kind: str,
    *,
    key: str = "",
    subject: str = "",
    reason: reasons.Reason.ValueType = reasons.REASON_UNSPECIFIED,
    detail: str = "",
) -> None:
    """Count an offence, and remember it for the operator."""
    metrics.SECURITY_EVENTS.labels(kind).inc()
    put_back([Offence(kind, key, subject, reason, detail)])


def ignore(record: Record, error: Invalid, *, new: bool) -> None:
    """Count and log a message that does not verify, and report it where it is `new`: older ones were when they came."""
    reason = reason_name(error.reason)
    metrics.EVENTS_REJECTED.labels(reason).inc()
    if new:
        report(kind_of(error.reason), subject=record.subject, reason=error.reason, detail=str(error))
    if not _worth_a_line():
        return
    log.warning(
        "ignored a message that does not verify",
        security=True,
        subject=record.subject,
        sequence=record.sequence,
        reason=reason,
        error=str(error),
    )


def _worth_a_line() -> bool:
    """Return whether the log takes another line about such messages: a flood of them is counted, and not told one by one."""
    try:
        _lines.take("")
    except Invalid:
        return False
    return True


def collect() -> list[Offence]:
    """Return and clear the waiting offences."""
    found = list(_waiting.values())
    _waiting.clear()
    return found


def put_back(offences: Iterable[Offence]) -> None:
    """Let them wait (again)."""
    for offence in offences:
        place = (offence.kind, offence.key)
        known = _waiting.get(place)
        if known is not None:
            _waiting[place] = replace(known, count=known.count + offence.count)
        elif len(_waiting) < MAX_WAITING:
            _waiting[place] = offence


def kind_of(reason: reasons.Reason.ValueType) -> str:
    """Return the kind of offence of a message that does not verify."""
    named = {
        reasons.REASON_BAD_SIGNATURE: "bad_signature",
        reasons.REASON_NOT_PERMITTED: "not_permitted",
        reasons.REASON_BANNED: "banned_key",
        reasons.REASON_QUOTA_EXCEEDED: "quota",
    }
    return named.get(reason, "malformed")
