"""Read from the services of an installation what they cannot do now, and what each run waits for."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any

from connito.platform.datadir import DataDir
from connito.runtime.waiting import REPAIR

_SECONDS = 1.0
# What a service waits for that is stopped, or has no turn at a core.
PROCESS = "process"
_SILENT = f"its process lives and does not answer within {_SECONDS:.0f} s; is it stopped, or the machine overloaded?"


@dataclass(frozen=True)
class Wait:
    """An act that a service cannot do now: the action or message, its run, what that waits for, and the error in words.

    `given_up`: it is tried again only now and then, or when the service is started again.
    """

    service: str
    what: str
    run: str
    dependency: str
    error: str
    given_up: bool

    def __str__(self) -> str:
        where = self.what.removeprefix(f"{self.run}/")
        until = f"waits for {self.dependency}"
        if self.dependency == REPAIR:
            until = "has given up" if self.given_up else "fails, and tries again"
        return f"{self.service} {until} ({where}): {self.error}"


def waits(data: DataDir) -> list[Wait]:
    """Return what the services here wait for, in the order of their names; of one that does not answer, that it does not."""
    found = []
    for name in sorted(data.read_pids()):
        with suppress(OSError, ValueError, KeyError, TypeError, HTTPException):
            port = json.loads((data.root / "ports" / f"{name}.json").read_text())["http"]
            try:
                found += [Wait(name, **row) for row in json.loads(_page(port))]
            except TimeoutError:
                found.append(Wait(name, "answering", "", PROCESS, _SILENT, given_up=False))
    return found


def waiting(data: DataDir) -> list[dict[str, Any]]:
    """Return how many actions and messages wait here, whose, and why the first of them does: a row a run and dependency."""
    groups: dict[tuple[str, str], list[Wait]] = defaultdict(list)
    for wait in waits(data):
        groups[wait.run, wait.dependency].append(wait)
    return [
        {
            "run": run,
            "dependency": dependency,
            "count": len(group),
            "services": sorted({wait.service for wait in group}),
            "error": group[0].error,
        }
        for (run, dependency), group in sorted(groups.items())
    ]


def _page(port: int) -> bytes:
    connection = HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request("GET", "/waiting")
        return connection.getresponse().read()
    finally:
        connection.close()
