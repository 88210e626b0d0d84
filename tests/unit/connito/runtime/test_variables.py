"""A `CONNITO_…` variable that nothing reads is told by its name, with the nearest one that something does read."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from connito.runtime.settings import ServiceSettings
from connito.runtime.variables import KNOWN, PREFIX, SETTINGS, unknown

ROOT = Path(__file__).parents[4]
SERVICES = sorted(path.parent.name for path in (ROOT / "services").glob("*/settings.py"))
READERS = ("shared", "services", "scripts", "deploy", "helm", "docs", "tests", "bench", "Makefile", "README.md")
NAME = re.compile(r"(?<!_)\bCONNITO_[A-Z0-9_]*[A-Z0-9]\b(?!_)")


def clean(**variables: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)} | variables


def test_the_names_are_those_that_services_have() -> None:
    declared = {
        variable
        for service in SERVICES
        for part in vars(importlib.import_module(f"services.{service}.settings")).values()
        if isinstance(part, type) and issubclass(part, ServiceSettings)
        for variable, _, _ in part.describe()
    }
    assert declared == SETTINGS


def test_the_other_names_occur_somewhere() -> None:
    files = [path for top in READERS for path in ([ROOT / top] if (ROOT / top).is_file() else (ROOT / top).rglob("*"))]
    # What was compiled keeps names that its source has lost, and those of this file.
    written = [path for path in files if path.is_file() and path != Path(__file__) and "__pycache__" not in path.parts]
    texts = [path.read_bytes().decode(errors="replace") for path in written]
    here = "\n".join(text for text in texts if "CONNITO_" in text)
    served = {f"CONNITO_SERVE_{name}" for name in re.findall(r"_variable\(\"(\w+)\"\)", here)}
    assert sorted(KNOWN - SETTINGS - served - set(NAME.findall(here))) == []
    assert served <= KNOWN


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CONNITO_NAT_URL", "the nearest name is CONNITO_NATS_URL"),
        ("CONNITO_CACHE_MAXBYTES", "the nearest name is CONNITO_CACHE_MAX_BYTES"),
        ("CONNITO_SERVE_WAIT", "the nearest name is CONNITO_SERVE_WAITING"),
        ("CONNITO_XYZZY", "take it out"),
    ],
)
def test_the_nearest_name_is_told(name: str, says: str) -> None:
    (sentence,) = unknown({name: "1", "CONNITO_RUN": "r", "OTHER": "x"})
    assert sentence == f"nothing reads {name}; {says}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CONNITO_NATS_SERVICE_HOST", "10.0.0.1"),
        ("CONNITO_COORDINATOR_SERVICE_PORT_GRPC", "9090"),
        ("CONNITO_STORE_PORT", "tcp://10.0.0.2:8333"),
        ("CONNITO_STORE_PORT_8333_TCP_ADDR", "10.0.0.2"),
        ("CONNITO_WHATEVER", ""),
    ],
)
def test_what_a_cluster_adds_and_what_is_empty_is_nobodys_mistake(name: str, value: str) -> None:
    assert [*unknown({name: value})] == []


def test_a_service_does_not_start_with_a_misspelt_setting(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "services.library"]
    env = clean(CONNITO_KEY_FILE=str(tmp_path / "none"), CONNITO_LOGLEVEL="debug")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "library: bad settings: nothing reads CONNITO_LOGLEVEL; the nearest name is CONNITO_LOG_LEVEL. "
        "`--help` lists the variables of this service"
    )


@pytest.mark.parametrize(
    ("written_for", "starts"), [("0.1.0", False), ("0.0.9", False), ("99.0.0", True), ("0.99", True), ("soon", False)]
)
def test_a_service_passes_over_what_was_written_for_a_version_after_it(written_for: str, starts: bool) -> None:
    command = [sys.executable, "-m", "services.library"]
    env = clean(CONNITO_FOR_VERSION=written_for, CONNITO_LOGLEVEL="debug", CONNITO_DRAIN_SECONDS="never")
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert ("they were written for a version after" in done.stderr) is starts
    # What it does know is held to its own rules all the same.
    assert ("CONNITO_DRAIN_SECONDS: input should be" in done.stderr) is starts


def test_a_command_warns_once_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "connito.cli", "--version"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=clean(CONNITO_DATADIR="x"),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stderr == "connito: warning: nothing reads CONNITO_DATADIR; the nearest name is CONNITO_DATA_DIR\n"
