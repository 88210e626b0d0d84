"""The commands in the docs, run: blocks after `<!-- run -->` in a page, one after the other, in one folder.

`<!-- run over a platform -->` means that one runs there before, on the tiny base; `RUN` is its run, which has ended. What a page
leaves open (`UA…`, `DIR`, `deploy/secrets`) is filled in, see `STANDS_FOR`. tests/unit/docs/test_commands.py wants a mark
before each block.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from connito.base.recipes import cached_base
from connito.wire.identity import Identity

from tests.support.waiting import wait_until

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


# What a reader puts in, as a regular expression, and what stands in its place over a platform of `connito up` in this folder.
STANDS_FOR = {
    r"deploy/secrets": ".connito",
    r"(nats|tls)://[\w.]+:4222": "$BUS",
    r"(?<=--roster )roster\.json|(?<=ROSTER=)roster\.json": ".connito/roster.json",
    r"(?<=export )CONNITO_KEY_FILE=miner": "CONNITO_NATS_URL=$BUS CONNITO_ROSTER=.connito/roster.json CONNITO_KEY_FILE=miner",
    r"\bRUN/CYCLE/LABEL\b": "$RUN/1/miner-1",
    r"(?<![$\w{])RUN\b": "$RUN",
    r"\bLABEL\b": "miner-1",
    r"eyJ0eXAi…|\bPASS\b": "given.pass",
    r"\bU(A|OLD)…": "$(cat one.pub)",
    r"\bUNEW…": "$(cat another.pub)",
    r"\$CONNITO_WORK_DIR/\$RUN/receipts/2-6\.checkpoint": "$(ls .connito/miners/miner-1/$RUN/receipts/*.checkpoint | head -1)",
    r"\b(EXPERT|SOURCE)\b": "$EXPERT",
    r"\b(BASE|OUT|DIR)\b": "$BASE",
    r"\bTEXT\b": "memo.txt",
}
JOB = (
    """{domain: memos, base: tiny, profile: tiny, data: [{path: text.txt}], license: CC-BY-4.0, data_statement: ours}"""
)
TEXTS = ("memo", "medical", "code", "law", "med", "part1", "part2", "text")


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
    """Start one, and lay out what a reader has: a base, texts, a job, the key of somebody else."""
    started = shell.run("bash", " ".join(["connito up --base tiny --no-wait --json", *SMALL]))
    assert started.returncode == 0, started.stderr
    shell.variables["RUN"] = json.loads(started.stdout)["run"]
    ended = shell.run("bash", 'connito job watch "$RUN" --json')
    assert ended.returncode == 0, ended.stderr
    shelf: list[dict[str, str]] = []

    def laid_down() -> bool:
        shelf[:] = json.loads(shell.run("bash", "connito library list --json").stdout)["experts"]
        return bool(shelf)

    wait_until(laid_down, "the run's expert, which the library lays down after its end")
    more = {
        "BUS": json.loads((shell.folder / ".connito/platform.json").read_text())["nats_url"],
        "EXPERT": shelf[0]["expert_id"],
        "BASE": str(cached_base("tiny") / "model"),
    }
    shell.variables.update(more)
    for name in TEXTS:
        said = (f"{name} {number}: {' '.join(words(f'{name} {number}'))}." for number in range(400))
        (shell.folder / f"{name}.txt").write_text("\n\n".join(said))
    (shell.folder / "job.yaml").write_text(JOB)
    for name in ("one", "another"):
        (shell.folder / f"{name}.pub").write_text(Identity.generate().public)


def words(seed: str) -> list[str]:
    """Thirty words that no other text has in this order."""
    return [hashlib.sha256(f"{seed} {number}".encode()).hexdigest()[:5] for number in range(30)]


def filled_in(text: str) -> str:
    for pattern, value in STANDS_FOR.items():
        text = re.sub(pattern, lambda _, value=value: value, text)  # type: ignore[misc]
    return text


def handed_over(shell: Shell, said: str) -> None:
    """What goes from hand to hand between two blocks: the key that was made last, the pass that was printed last."""
    made = list(shell.folder.glob("*.nk"))
    if made and not (shell.folder / "given.pass").exists():
        key = Identity.load(max(made, key=lambda path: path.stat().st_mtime)).public
        (shell.folder / "one.pub").write_text(key)
    if found := re.search(r"eyJ[\w.~-]+", said):
        (shell.folder / "given.pass").write_text(found[0])


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_work(page: str, shell: Shell) -> None:
    found = blocks(PAGES[page])
    over = any(needs for needs, _, _ in found)
    try:
        if over:
            a_platform(shell)
        for _, language, text in found:
            if over and "given.pass" in filled_in(text) and not (shell.folder / "given.pass").exists():
                handed_over(shell, shell.run("bash", 'connito access add .connito "$(cat one.pub)"').stdout)
            done = shell.run(language, filled_in(text) if over else text)
            assert done.returncode == 0, f"{page}:\n{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            handed_over(shell, done.stdout)
    finally:
        shell.run("bash", "connito down")


def test_the_pages_that_teach_commands_are_run() -> None:
    assert {"README.md", "docs/tutorial/first-cycle.md", "docs/how-to/audit-a-run.md", "docs/how-to/drain.md",
            "docs/how-to/restore.md", "docs/how-to/deploy.md", "docs/how-to/keep-and-remove.md",
            "docs/how-to/organisations.md", "docs/how-to/rotate-keys.md", "docs/how-to/run-a-miner.md",
            "docs/how-to/use-an-expert.md"} <= set(PAGES)  # fmt: skip
