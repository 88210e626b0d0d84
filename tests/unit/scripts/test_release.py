"""`scripts/release` and `scripts/check-subject`, in repositories of their own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import connito
import pytest
import yaml

ROOT = Path(__file__).parents[3]
FILES = (
    "CHANGELOG.md",
    "pyproject.toml",
    "shared/connito/__init__.py",
    "helm/connito/Chart.yaml",
    "deploy/compose.yaml",
    "scripts/release",
)
WHO = ("-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *WHO, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "A")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.com")
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    text = (
        "# Changelog\n\n## Unreleased\n\n### Added\n- One thing.\n\n## 0.1.0 — 2026-01-02\n\n### Added\n- The first.\n"
    )
    (tmp_path / "CHANGELOG.md").write_text(text)
    version = tmp_path / "shared/connito/__init__.py"
    version.write_text(re.sub(r'__version__ = ".*"', '__version__ = "0.1.0"', version.read_text()))
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "Begin")
    return tmp_path


def release(folder: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "scripts/release"), version]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_unreleased_becomes_a_version_with_a_date(clone: Path) -> None:
    done = release(clone, "0.2.0")
    assert done.returncode == 0, done.stderr
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    expected = f"## Unreleased\n\n## 0.2.0 — {today}\n\n### Added\n- One thing.\n\n## 0.1.0 — 2026-01-02\n"
    assert expected in (clone / "CHANGELOG.md").read_text()
    assert '\n__version__ = "0.2.0"\n' in (clone / "shared/connito/__init__.py").read_text()
    chart = yaml.safe_load((clone / "helm/connito/Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == ("0.2.0", "0.2.0")
    compose = yaml.safe_load((clone / "deploy/compose.yaml").read_text())
    assert compose["x-environment"]["CONNITO_FOR_VERSION"] == "0.2.0"
    assert git(clone, "log", "-1", "--format=%s").strip() == "Release 0.2.0"
    assert git(clone, "status", "--porcelain") == ""


def test_a_tree_with_changes_is_refused(clone: Path) -> None:
    (clone / "new").touch()
    done = release(clone, "0.2.0")
    assert done.returncode == 1
    assert "commit or stash" in done.stderr
    assert "0.2.0" not in (clone / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("0.1.0", "does not come after"),
        ("0.0.9", "does not come after"),
        ("1.0", "no version"),
        ("v1.0.0", "no version"),
    ],
)
def test_versions_that_are_none_or_were_are_refused(clone: Path, version: str, problem: str) -> None:
    done = release(clone, version)
    assert done.returncode == 1
    assert problem in done.stderr
    assert git(clone, "status", "--porcelain") == ""


def test_nothing_unreleased_is_nothing_to_release(clone: Path) -> None:
    assert release(clone, "0.2.0").returncode == 0
    done = release(clone, "0.3.0")
    assert done.returncode == 1
    assert "nothing to release" in done.stderr


def test_the_version_stands_in_one_place_and_everything_agrees() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" not in project["project"]
    source = ROOT / project["tool"]["hatch"]["version"]["path"]
    assert f'\n__version__ = "{connito.__version__}"\n' in source.read_text()
    chart = yaml.safe_load((ROOT / "helm/connito/Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == connito.__version__


@pytest.mark.parametrize(
    ("subject", "code"),
    [
        ("Load persistent buffers in ranged reads", 0),
        ("x" * 72, 0),
        ("Σ" * 72, 0),
        ("x" * 73, 1),
        ("Load buffers.", 1),
        ("", 1),
        ("\n# a comment\n\nLoad buffers", 0),
        ("Merge branch 'a' into a branch whose name makes the subject longer than a person would write", 0),
    ],
)
def test_a_commit_subject_has_a_length(tmp_path: Path, subject: str, code: int) -> None:
    message = tmp_path / "message"
    message.write_text(f"{subject}\n\nA body, as long as it takes.\n# a comment\n")
    done = subprocess.run([ROOT / "scripts/check-subject", message], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_the_hooks_are_local_and_what_they_start_exists() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    scripts = [hook["entry"] for hook in config["repos"][0]["hooks"] if not hook["entry"].startswith(".venv/")]
    assert scripts == ["scripts/check-subject"]
    assert all((ROOT / script).is_file() for script in scripts)
