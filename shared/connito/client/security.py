"""Security events: what services, and the broker, saw that only happens under attack or misconfiguration."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from connito.errors import Invalid, NotFound
from connito.platform.session import Session
from connito.runtime.tasks import blocking
from connito.v1.cycle_pb2 import SecurityEvent
from connito.wire.enums import reason_name
from connito.wire.envelope import open_bytes

_VIOLATION = re.compile(
    r'(\d{4})/(\d\d)/(\d\d) (\d\d:\d\d:\d\d)\S* \[ERR\] .*?(U[A-Z2-7]{55})".* - '
    r'(Publish|Subscription) Violation - .*?Subject "([^"]*)"'
)


def advisories(session: Session, after: float, broker_log: Path | None = None) -> list[dict[str, Any]]:
    """Return reports and denials since `after` (Unix seconds), oldest first. Raises `Retry`, and `NotFound` for a log
    that is not there.
    """
    path = broker_log or (session.data.logs / "nats-server.log" if session.data is not None else None)
    rows = [*blocking(_events(session, after)), *(_violations(path, after) if path is not None else [])]
    return sorted(rows, key=lambda row: str(row["at"]))


async def _events(session: Session, after: float) -> list[dict[str, Any]]:
    """Return reports that a key of the roster has signed."""
    rows = []
    async with session.bus() as bus:
        async for item in bus.stored(["ADVISORIES"]):
            if item.time_unix_ms < after * 1000:
                continue
            try:
                opened = open_bytes(item.data, item.subject)
                event = opened.read(SecurityEvent)
            except Invalid:
                continue
            if not any(session.roster.permits(role, opened.signer) for role in session.roster.keys):
                continue
            rows.append(
                {
                    "at": _stamp(item.time_unix_ms / 1000), "kind": event.kind, "count": event.count, "key": event.key,
                    "reporter": event.service, "subject": event.subject, "reason": reason_name(event.reason),
                    "detail": event.detail,
                }
            )  # fmt: skip
    return rows


def _violations(path: Path, after: float) -> list[dict[str, Any]]:
    """Return subjects that the broker denied, from its log. Raises `NotFound` for a file that is not there."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise NotFound(f"cannot read the broker's log {path}: {error.strerror}") from error
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for year, month, day, clock, key, action, subject in _VIOLATION.findall(text):
        at = f"{year}-{month}-{day} {clock}"
        if at < _stamp(after, local=True):
            continue
        row = found.setdefault(
            (action, key, subject),
            {
                "at": at, "kind": "denied", "count": 0, "key": key, "reporter": "nats-server", "subject": subject,
                "reason": "not-permitted", "detail": action.lower(),
            },
        )  # fmt: skip
        row["count"] += 1
        row["at"] = at
    return list(found.values())


def _stamp(at: float, *, local: bool = False) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at) if local else time.gmtime(at))
