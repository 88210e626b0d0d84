"""The whole platform as a user starts it: `connito up` in a process of its own.

`up`   runs it to its end in a fresh folder and returns what came out
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

UP_SECONDS = 280


@dataclass(frozen=True)
class Finished:
    """One `connito up --json` that ended."""

    code: int
    stdout: str
    stderr: str
    data: Path

    @property
    def report(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.data / "report.json").read_text())
        return document

    def row(self, cycle: int, miner: str) -> dict[str, Any]:
        """What became of a miner in a cycle."""
        rows = self.report["cycles"][cycle - 1]["submissions"]
        return next(row for row in rows if row["miner"] == miner)

    def artifact(self, digest: str) -> Path:
        """A file of the services' artifact cache."""
        return self.data / "cache" / "sha256" / digest[:2] / digest

    def explain(self) -> str:
        """For a failed assertion: what the command and the services said."""
        logs = [f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted((self.data / "logs").glob("*.log"))]
        return "\n".join([f"exit code {self.code}", self.stdout, self.stderr, *logs])


Up = Callable[..., Finished]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share its platform, so one worker runs them all (`--dist loadgroup`); pages of the docs have one each."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.path.name != "test_docs.py":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("CONNITO_")} | {
        name: value for name, value in os.environ.items() if name == "CONNITO_CACHE_DIR"
    }


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Up:
    def run(*options: str | Path) -> Finished:
        data = tmp_path_factory.mktemp("up") / "data"
        command = [sys.executable, "-m", "connito.cli", "up", "--base", "tiny", "--json", "--data-dir", data, *options]
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            check=False,
            env=environment(),
            timeout=UP_SECONDS,
        )
        return Finished(done.returncode, done.stdout, done.stderr, data)

    return run
