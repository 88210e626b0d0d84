"""Pinned versions install wherever the project says that it runs."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[3]


def test_every_pin_takes_the_oldest_python_that_we_name() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    oldest = wanted.removeprefix(">=") + ".0"
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    checked, refused = 0, {}
    for name, version in pins.items():
        try:
            found = distribution(name)
        except PackageNotFoundError:
            continue
        # Whoever has installed another version knows nothing of this one.
        if Version(found.version) == Version(version):
            checked += 1
            needs = found.metadata["Requires-Python"] or ""
            if not SpecifierSet(needs).contains(oldest):
                refused[name] = needs
    assert refused == {}
    assert checked > len(pins) / 2
