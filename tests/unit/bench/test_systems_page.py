"""The page of systems: every module, test and verb that it names is there."""

from __future__ import annotations

import ast

import pytest
from typer.main import get_command

from bench.evidence import ROOT
from bench.systems_page import SYSTEMS, System, render


def test_a_figure_that_changes_changes_the_page() -> None:
    class Everything(dict[str, list[float]]):
        def __missing__(self, key: str) -> list[float]:
            return [7.125, 7.0, 7.25] if key == "cost naee" else [0.0, 0.0, 0.0]

    document = {"figures": Everything(any=[0.0]), "settings": {"seeds": 1}, "name": "systems", "seconds": 1,
                "machine": {"cores": 1, "cpu": "x", "memory_bytes": 1}}  # fmt: skip
    assert "7.125 (7.000 to 7.250)" in render(document)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_what_an_entry_names_is_there(system: System) -> None:
    assert (ROOT / system.module).is_file()
    file, _, name = system.oracle.partition("::")
    defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in defined


@pytest.mark.parametrize("system", [s for s in SYSTEMS if s.reach.startswith("connito ")], ids=lambda s: s.name)
def test_a_user_comes_to_it_as_it_says(system: System) -> None:
    from connito.cli.app import app

    command = get_command(app)
    words = system.reach.split()[1:]
    while words and not words[0].startswith("--"):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options
