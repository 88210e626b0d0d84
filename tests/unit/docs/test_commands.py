"""Commands in the docs: each block is run by a test or says why not, and no `connito …` names what does not exist.

Before a block of commands stands one of

    <!-- run --> or <!-- run over a platform -->     tests/e2e/test_docs.py runs it
    <!-- tested by PATH -->                          a test, or another page, runs these verbs with these options
    <!-- not run: REASON -->                         it needs what no test has
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from connito.cli.app import app

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```", re.MULTILINE | re.DOTALL
)
COMMAND = re.compile(
    r"^(?:sudo |[A-Z_]+=\S+ )*(?:\S*/)?(?:connito|make|pip|helm|kubectl|docker|pytest|btcli|git|python3?)(?: |$)",
    re.MULTILINE,
)
REASONS = {
    "docker": "no test has a daemon; images are built and Compose files read by others",
    "cluster": "no test has one; what Helm renders is validated by others",
    "root": "changes the machine",
    "package index": "downloads what is installed here",
    "hub": "needs an account; a stand-in is in test_hub.py",
    "chain": "needs a wallet's key or a subnet; test_hotkeys.py has both sides",
    "other options": "a test runs the verb with others; that these exist is checked below",
    "another model": "needs models that no test downloads",
    "minutes": "takes longer than a test may",
    "waits": "goes on until it is interrupted; others start it",
    "checkout": "is about changing this repository, and part of its own checks",
}
VERBS: Any = typer.main.get_command(app)


def blocks() -> Iterator[tuple[str, str, str]]:
    """(page and line, mark, text) of each block of commands."""
    for page in PAGES:
        text = page.read_text()
        for found in BLOCK.finditer(text):
            if found["language"] == "bash" or (not found["language"] and COMMAND.search(found["text"])):
                where = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}"
                yield where, found["mark"] or "", found["text"] if found["language"] else ""


def calls(text: str) -> Iterator[list[str]]:
    """The words after `connito` of each call in a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|\|\||;|\$\(", re.sub(r"(^|\s)#.*", "", line)):
            found = re.search(r"(?:^|[\s/])connito (?!\[)(?P<rest>[a-z].*)", part)
            # There it is the name of a release or a namespace.
            if found and not re.search(r"\b(helm|kubectl)\b", part):
                yield re.findall(r"[^\s'\"`)]+", found["rest"])


def problem(words: list[str]) -> str:
    """What is wrong with a call; empty if its verb and its options exist."""
    command: Any = VERBS
    names: list[str] = []
    for word in words:
        below = getattr(command, "commands", None)
        if below is None:
            break
        if missing := [one for one in word.split("|") if one not in below]:
            return f"connito {' '.join([*names, missing[0]])}: there is no such verb"
        command, names = below[word.partition("|")[0]], [*names, word]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word.partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
    wrong = [option for option in unknown if option not in known | {"--help"}]
    return f"connito {' '.join(names)} has no {wrong[0]}" if wrong else ""


def verbs(text: str) -> set[tuple[str, ...]]:
    """The verbs that are called, without what they are called with."""
    return {tuple(_called(words)) for words in calls(text)}


def _called(words: list[str]) -> Iterator[str]:
    command: Any = VERBS
    for word in words:
        if word not in getattr(command, "commands", {}):
            return
        command = command.commands[word]
        yield word


def test_every_block_is_run_or_says_why_not() -> None:
    marks = {where: mark for where, mark, text in blocks() if text}
    unlabelled = [where for where, _, text in blocks() if not text]
    allowed = re.compile(rf"run( over a platform)?|tested by \S+|not run: ({'|'.join(REASONS)})")
    assert unlabelled == [], "commands stand in blocks that begin with ```bash"
    assert {where: mark for where, mark in marks.items() if not allowed.fullmatch(mark)} == {}
    assert set(REASONS) == {mark.removeprefix("not run: ") for mark in marks.values() if mark.startswith("not run")}


def test_what_is_tested_elsewhere_is_there() -> None:
    for where, mark, text in blocks():
        if mark.startswith("tested by "):
            place = ROOT / mark.removeprefix("tested by ")
            there = "\n".join(path.read_text() for path in ([place] if place.is_file() else sorted(place.glob("*.py"))))
            called = verbs(text)
            assert called, where
            for names in called:
                assert f"connito {' '.join(names)}" in there or f'"{names[-1]}"' in there, (where, names)
            options = {word.partition("=")[0] for words in calls(text) for word in words if re.match("--[a-z]", word)}
            assert {option for option in options if not re.search(rf"{option}\b", there)} == set(), where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_and_options_exist(page: Path) -> None:
    text = page.read_text()
    fenced = "\n".join(found["text"] for found in BLOCK.finditer(text) if found["language"] in {"", "bash"})
    inline = "\n".join(re.findall(r"`((?:\S+ )?connito [a-z][^`]*)`", BLOCK.sub("", text).replace("\n", " ")))
    wrong = [said for words in calls(f"{fenced}\n{inline}") if (said := problem(words))]
    assert wrong == []


def test_a_wrong_call_is_found() -> None:
    assert problem(shlex.split("job chekc job.yaml")) == "connito job chekc: there is no such verb"
    assert problem(shlex.split("audit RUN --logonly")) == "connito audit has no --logonly"
    assert [problem(words) for words in calls("sudo X=1 connito access add F U… --bus nats://h:1 # said --no")] == [""]
