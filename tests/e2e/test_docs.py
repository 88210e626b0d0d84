"""The commands in the docs, run: blocks after `<!-- run -->` in a page, one after the other, in one folder.

`<!-- run over a platform -->` means that one runs there before, on the tiny base; `RUN` is its run, which has ended.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from .conftest import environment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- run(?: (over a platform))? -->\n```(bash|python)\n(.*?)```", re.DOTALL)
SMALL = ("--cycles", "1", "--miners", "1", "--validators", "1", "--set", "training.local_steps=16")


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(what it needs, language, text) of what a page says that can be run."""
    return BLOCK.findall(page.read_text())


PAGES = {
    str(page.relative_to(ROOT)): page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if blocks(page)
}


@dataclass(frozen=True)
class Shell:
    """A folder with `.venv` in it, as in a checkout, and the variables of a page."""

    folder: Path
    variables: dict[str, str]

    def run(self, language: str, text: str) -> subprocess.CompletedProcess[str]:
        scripts = Path(sys.executable).parent
        env = environment() | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"} | self.variables
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "bash" else [sys.executable, "-c", text]
        return subprocess.run(
            command, cwd=self.folder, env=env, capture_output=True, text=True, check=False, timeout=280
        )


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    for name in ("deploy", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("secrets"))
    return Shell(tmp_path, {})


def a_platform(shell: Shell) -> None:
    started = shell.run("bash", " ".join(["connito up --base tiny --no-wait --json", *SMALL]))
    assert started.returncode == 0, started.stderr
    shell.variables["RUN"] = json.loads(started.stdout)["run"]
    ended = shell.run("bash", 'connito job watch "$RUN" --json')
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(page: str, shell: Shell) -> None:
    found = blocks(PAGES[page])
    try:
        if any(needs for needs, _, _ in found):
            a_platform(shell)
        for _, language, text in found:
            done = shell.run(language, text)
            assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    finally:
        shell.run("bash", "connito down")


def test_the_pages_that_teach_commands_are_run() -> None:
    assert {"README.md", "docs/tutorial/first-cycle.md", "docs/how-to/audit-a-run.md", "docs/how-to/drain.md",
            "docs/how-to/restore.md", "docs/how-to/deploy.md", "docs/how-to/keep-and-remove.md"} <= set(PAGES)  # fmt: skip
