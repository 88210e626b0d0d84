"""The tests mirror the tree: whoever moves a package moves its tests."""

from __future__ import annotations

from pathlib import Path

import pytest

UNIT = Path(__file__).parent
ROOT = UNIT.parents[1]
SOURCES = {"connito": ROOT / "shared" / "connito", "services": ROOT / "services", "bench": ROOT / "bench"}


@pytest.mark.parametrize("part", SOURCES)
def test_each_test_lies_in_a_folder_of_the_tree(part: str) -> None:
    folders = {path.parent.relative_to(UNIT / part) for path in (UNIT / part).rglob("*.py")}
    assert folders
    assert [str(folder) for folder in folders if not (SOURCES[part] / folder / "__init__.py").exists()] == []
