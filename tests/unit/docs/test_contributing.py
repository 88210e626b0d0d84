"""The way in: every path that the pages name exists, and the images are those of the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted((ROOT / "docs/contributing").glob("*.md"))
TOPS = ("shared", "services", "tests", "proto", "deploy", "helm", "bench", "scripts", "docs")
CODE = re.compile(r"`([^`\s]+)`")


def paths(text: str) -> list[Path]:
    """Every path in a text; a bare file name lies beside the path before it in the line."""
    found: list[Path] = []
    for line in text.splitlines():
        folder: Path | None = None
        for name in CODE.findall(line):
            if name.partition("/")[0] in TOPS and "/" in name and "<" not in name:
                found.append(ROOT / name)
                folder = found[-1].parent
            elif folder is not None and re.fullmatch(r"\w+\.(py|yaml)", name):
                found.append(folder / name)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_every_path_exists(page: Path) -> None:
    named = paths(page.read_text())
    assert named
    assert [str(path.relative_to(ROOT)) for path in named if not path.exists()] == []


def test_a_path_that_is_gone_would_be_found() -> None:
    named = paths("| a | `shared/connito/wire/facts.py`, `gone.py` |")
    assert [path.name for path in named if not path.exists()] == ["gone.py"]


def test_the_code_map_names_every_wing() -> None:
    text = (ROOT / "docs/contributing/code-map.md").read_text()
    wings = {path.parent.name for path in (ROOT / "shared/connito").glob("*/__init__.py")} - {"v1", "render"}
    assert {wing for wing in wings if f"shared/connito/{wing}/" not in text} == set()


def test_the_images_are_up_to_date(tmp_path: Path) -> None:
    script = ROOT / "scripts/generate-diagrams"
    subprocess.run([sys.executable, script, tmp_path], check=True)
    for image in ("wings.svg", "submission.svg", "system.svg", "cycle.svg"):
        current = (ROOT / "docs/images" / image).read_text()
        assert (tmp_path / image).read_text() == current, "run scripts/generate-diagrams and commit the result"
    drawn = re.findall(r">((?:shared|services)/[\w/.]+)<", (tmp_path / "submission.svg").read_text())
    assert len(drawn) == 10
    assert [path for path in drawn if not (ROOT / path).is_file()] == []
