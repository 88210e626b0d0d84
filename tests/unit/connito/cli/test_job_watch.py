"""What `connito job watch` prints while a run goes on, and `connito job show` of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from connito.cli.app import app
from connito.v1.cycle_pb2 import DomainLoss
from connito.v1.run_pb2 import RunSpec
from connito.v1.services_pb2 import RUN_PHASE_COMPLETED, RUN_PHASE_RUNNING, RunStatus
from typer.testing import CliRunner

SPEC = RunSpec(run="r1", cycles=2)
LOSSES = [DomainLoss(domain="law", before=2.5, after=2.25), DomainLoss(domain="code", before=1.0, after=1.0125)]


def went(window: str, cycle: int = 1, **fields: Any) -> RunStatus:
    of: dict[str, Any] = {"phase": RUN_PHASE_RUNNING, "cycle": cycle, "window": window, "detail": f"cycle {cycle} of 2"}
    return RunStatus(spec=SPEC, **of | fields)


STORY = [
    went("train"),
    went(""),
    went("train"),
    went(""),
    went("merge"),
    went("", version=1, losses=LOSSES, merged=["UA", "UB"]),
    went("train", 2, version=1, losses=LOSSES, merged=["UA", "UB"]),
    went("", 2, version=2, losses=LOSSES[:1], merged=["UA"]),
    went("", 2, version=2, losses=LOSSES[:1], merged=["UA"], phase=RUN_PHASE_COMPLETED, detail="2 of 2 cycles done"),
]


class Watched:
    """A platform whose one run goes as `STORY` tells."""

    job: Watched

    def __enter__(self) -> Watched:
        self.job = self
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def watch(self, run: str) -> Iterator[RunStatus]:
        yield from STORY


def test_each_version_s_losses_and_each_window_are_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("connito.client.Client.local", lambda data_dir: Watched())
    done = CliRunner().invoke(app, ["job", "watch", "r1", "--data-dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[:-1] == [
        "r1: running; cycle 1 of 2, train",
        "r1: running; cycle 1 of 2, merge",
        "r1: version 1: law loss 2.5000 → 2.2500 nats per token, general +0.0125; merged from 2 miners",
        "r1: running; cycle 2 of 2, train",
        "r1: version 2: law loss 2.5000 → 2.2500 nats per token; merged from 1 miner",
        "r1: completed; 2 of 2 cycles done",
    ]


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (
            went("train", deadline_unix_ms=1_800_000_000_000),
            ["window               train", "window closes        2027-01-15 08:00:00 UTC at the latest"],
        ),
        (went("", version=2), []),
    ],
)
def test_a_status_has_names_for_people_and_leaves_out_what_there_is_not(
    status: RunStatus, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("connito.client.runs.statuses", lambda *_: [status])
    shown = CliRunner().invoke(app, ["job", "show", "r1"]).output.splitlines()
    assert [line for line in shown if line.startswith("window")] == expected
    assert not [line for line in shown if line.startswith(("deadline_unix_ms", "text", "miners")) or line.endswith(" ")]
    assert f"version              {status.version}" in shown
    assert "given to its miners  0 tokens" in shown
    document = json.loads(CliRunner().invoke(app, ["job", "show", "r1", "--json"]).output)
    assert document["deadline_unix_ms"] == status.deadline_unix_ms
