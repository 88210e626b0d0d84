"""The wheel, installed where there is no checkout: one name on the path, and a platform that runs."""

from __future__ import annotations

import json
import os
import shutil
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
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    output([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a repository with what this checkout's git would commit, for pip to clone."""
    folder = tmp_path_factory.mktemp("repository")
    listed = output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    me = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*me, "commit", "-q", "-m", "all")):
        output(["git", *command], folder)
    return f"git+file://{folder}"


def environment_with(source: str | Path, folder: Path) -> Path:
    """A virtual environment with `source`, and after it on the path the packages that this checkout uses."""
    output([sys.executable, "-m", "venv", folder / "venv"], folder)
    python = folder / "venv" / "bin" / "python"
    # A folder named on the path, unlike a site folder, has none of its .pth files read: no editable install comes along.
    (site_packages(python, folder) / "others.pth").write_text(str(Path(typer.__file__).parents[1]))
    alone = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    output([python, "-m", "pip", "install", *alone, source], folder)
    return python


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def cloned(repository: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(repository, tmp_path_factory.mktemp("git"))


def site_packages(python: Path, folder: Path) -> Path:
    """Where `python` keeps what is installed into it."""
    return Path(output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip())


def test_one_name_is_put_on_the_path(installed: Path, tmp_path: Path) -> None:
    record = next(site_packages(installed, tmp_path).glob("connito-*.dist-info")) / "RECORD"
    names = {line.split(",")[0].split("/")[0] for line in record.read_text().splitlines()}
    assert {name for name in names if name != ".." and not name.endswith(".dist-info")} == {"connito"}


@pytest.mark.parametrize("source", ["installed", "cloned"])
def test_what_pip_installs_says_its_version_and_what_the_machine_lacks(
    source: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    from connito import __version__

    python: Path = request.getfixturevalue(source)
    connito = python.parent / "connito"
    assert output([connito, "--version"], tmp_path) == f"connito {__version__}\n"
    found = subprocess.run([connito, "doctor", "--json"], cwd=tmp_path, capture_output=True, text=True, check=False)
    checks = json.loads(found.stdout)["checks"]
    assert {"python", "nats-server", "weed"} <= {check["name"] for check in checks}
    assert all(check["ok"] or check["remedy"] for check in checks)
    # Typed for whoever checks code against it.
    marker = output([python, "-c", "import connito, pathlib; print(pathlib.Path(connito.__file__).parent)"], tmp_path)
    assert (Path(marker.strip()) / "py.typed").is_file()
    assert Path(marker.strip()).is_relative_to(python.parents[1])


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
