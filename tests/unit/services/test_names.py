"""One name of a service in a checkout, another in the wheel, and files that work under both."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from connito.runtime.programs import service_module

SERVICES = Path(__file__).parents[3] / "services"
NAMES = sorted(path.parent.name for path in SERVICES.glob("*/__main__.py"))


def test_a_checkout_runs_the_folder_of_the_repository() -> None:
    assert service_module("trainer") == "services.trainer"


@pytest.mark.parametrize("name", NAMES)
def test_modules_of_a_service_import_each_other_relatively(name: str) -> None:
    for path in (SERVICES / name).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [module for module in imported if module.split(".")[0] == "services"], path


def test_help_names_the_command_that_works_here() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.trainer", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("usage: python -m services.trainer\n")
