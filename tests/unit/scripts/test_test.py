"""`scripts/test` with stand-ins for the commands that it runs: one failure hides no later part."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
COMMANDS = ("ruff", "mypy", "lint-imports", "buf", "python", "diff")
PYTEST = """#!/bin/sh
[ -z "$PYTHONDONTWRITEBYTECODE" ] || { echo "nothing would be kept of what is compiled"; exit 3; }
touch "$(dirname "$0")/began"
case "$*" in
  *integration*"not images"*) echo "FAILED tests/integration/test_a.py::test_b - no"; echo "1 failed in 0.50s"; exit 1 ;;
  *chaos*) echo "Segmentation fault"; exit 139 ;;
  *) echo "3 passed in 0.25s" ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A PATH that begins with stand-ins; `mypy` finds an error."""
    for name in COMMANDS:
        (tmp_path / name).write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "mypy").write_text("#!/bin/sh\necho 'a/b.py:3: error: no'\nexit 1\n")
    (tmp_path / "pytest").write_text(PYTEST)
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "scripts" / "test"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_goes_on_after_a_failure_and_says_at_the_end_what_failed(environment: dict[str, str]) -> None:
    done = run(environment)
    summary = done.stdout.partition("== summary")[2]
    assert done.returncode == 1
    assert "FAILED  types (exit code 1)\n          line 1:a/b.py:3: error: no" in summary
    assert "passed  unit tests: 3 passed in 0.25s" in summary
    assert "FAILED  integration tests (exit code 1): 1 failed in 0.50s" in summary
    assert "line 1:FAILED tests/integration/test_a.py::test_b - no" in summary
    assert "FAILED  killed processes (exit code 139)\n          line 1:Segmentation fault" in summary
    assert "passed  browser" in summary
    assert summary.rstrip().endswith("3 of the parts above failed")


def test_succeeds_when_every_part_does(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "mypy").write_text("#!/bin/sh\nexit 0\n")
    done = run(environment, "check")
    summary = done.stdout.partition("== summary")[2]
    assert done.returncode == 0, done.stdout
    assert "passed  types" in summary
    assert "integration" not in done.stdout


def test_types_are_looked_at_beside_the_unit_tests_and_told_whole(environment: dict[str, str], tmp_path: Path) -> None:
    await_units = f"for _ in $(seq 200); do [ -e {tmp_path}/began ] && exit 0; sleep 0.1; done; exit 1"
    (tmp_path / "mypy").write_text(f"#!/bin/bash\necho begun\n{await_units}\n")
    done = run(environment, "check")
    assert done.returncode == 0, done.stdout
    assert "3 passed in 0.25s\n\n== types: mypy\nbegun\n\n== architecture: lint-imports\n" in done.stdout


def test_a_part_that_there_is_not_runs_nothing(environment: dict[str, str]) -> None:
    done = run(environment, "chekc")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "usage: scripts/test [check]\n")
