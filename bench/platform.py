"""Running the whole platform for a benchmark: `connito up` in a folder of its own, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.harness import note


def run_up(data_dir: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run `connito up` with `arguments` and return its report. Raises `RuntimeError` with its last words if it fails."""
    command = [sys.executable, "-m", "connito.cli", "up", "--data-dir", str(data_dir), *arguments]
    note("running: connito up " + " ".join(arguments))
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"connito up ended with {done.returncode}: {done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads((data_dir / "report.json").read_text())
    return report
