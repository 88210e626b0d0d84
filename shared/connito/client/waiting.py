"""Read from the services of an installation what each run waits for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPException
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from connito.platform.datadir import DataDir

_GAUGE = "connito_waiting"
_SECONDS = 1.0


def waiting(data: DataDir) -> list[dict[str, Any]]:
    """Return how many actions and messages wait here, a row a run and dependency. A service that does not answer is left out."""
    counts: Counter[tuple[str, str]] = Counter()
    for name in data.read_pids():
        with suppress(OSError, ValueError, KeyError, HTTPException):
            port = json.loads((data.root / "ports" / f"{name}.json").read_text())["http"]
            counts.update(dict(_gauges(_metrics(port))))
    return [
        {"run": run, "dependency": dependency, "count": count}
        for (run, dependency), count in sorted(counts.items())
        if count
    ]


def _metrics(port: int) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def _gauges(text: str) -> Iterator[tuple[tuple[str, str], int]]:
    for family in text_string_to_metric_families(text):
        if family.name == _GAUGE:
            for sample in family.samples:
                yield (sample.labels["run"], sample.labels["dependency"]), int(sample.value)
