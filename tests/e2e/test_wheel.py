"""The wheel, installed where there is no checkout: one name on the path, and a platform that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]


def output(command: Sequence[str | Path], folder: Path) -> str:
    """What `command` printed, run in `folder` with nothing of this checkout in its environment."""
    hidden = ("CONNITO_", "PYTHON", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and after it on the path the packages that this checkout uses."""
    folder = tmp_path_factory.mktemp("wheel")
    output([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], ROOT)
    (wheel,) = folder.glob("*.whl")
    output([sys.executable, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    output([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel], folder)
    # A folder named on the path, unlike a site folder, has none of its .pth files read: no editable install comes along.
    (site_packages(python, folder) / "others.pth").write_text(str(Path(typer.__file__).parents[1]))
    return python


def site_packages(python: Path, folder: Path) -> Path:
    """Where `python` keeps what is installed into it."""
    return Path(output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())


def test_one_name_is_put_on_the_path(installed: Path, tmp_path: Path) -> None:
    record = next(site_packages(installed, tmp_path).glob("connito-*.dist-info")) / "RECORD"
    names = {line.split(",")[0].split("/")[0] for line in record.read_text().splitlines()}
    assert {name for name in names if name != ".." and not name.endswith(".dist-info")} == {"connito"}


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    code = "import connito.runtime.programs as p; print(p.service_module('trainer'), p.__file__)"
    module, path = output([installed, "-c", code], tmp_path).split()
    assert module == "connito._services.trainer"
    assert Path(path).is_relative_to(installed.parents[1])


def test_connito_up_runs_without_a_checkout(installed: Path, tmp_path: Path) -> None:
    command = [
        str(installed.parent / "connito"),
        "up",
        "--base",
        "tiny",
        "--cycles",
        "1",
        "--json",
        "--data-dir",
        str(tmp_path / "data"),
    ]
    report = json.loads(output(command, tmp_path))
    assert len(report["cycles"]) == 1
    assert report["cycles"][0]["gate"] == "accepted"
