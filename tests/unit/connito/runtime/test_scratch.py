"""Temporary files of a process that was killed go when the next one starts; those of one that lives stay."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from connito.runtime import scratch

WAITS = """
import sys, tempfile
from pathlib import Path
from connito.runtime import scratch
with scratch.own(Path(sys.argv[1]), "someone"):
    held = tempfile.TemporaryDirectory(prefix="work-")
    print(held.name, flush=True)
    sys.stdin.read()
"""


def begun(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a temporary folder until its input ends, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    (killed, left), (lives, used) = begun(tmp_path), begun(tmp_path)
    killed.kill()
    killed.communicate()
    assert left.is_dir()
    assert tmp_path in left.parents
    with scratch.own(tmp_path, "next"):
        assert not left.parent.exists()
        assert used.is_dir()
        with tempfile.TemporaryDirectory() as mine:
            assert (tmp_path / "scratch") in Path(mine).parents
    lives.communicate("")
    assert list((tmp_path / "scratch").iterdir()) == []


def test_without_a_place_to_write_the_machines_own_is_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    before = tempfile.gettempdir()
    with scratch.own(tmp_path / "file", "someone"):
        assert tempfile.gettempdir() == before
