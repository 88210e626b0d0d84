from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import connito
import pytest


@pytest.mark.parametrize("name", ["Client", "compress", "load_expert", "select_experts"])
def test_the_public_names_resolve(name: str) -> None:
    assert getattr(connito, name).__name__ == name


def test_modules_that_the_pages_name_are_there_after_an_import_of_the_package_alone() -> None:
    page = (Path(__file__).parents[3] / "docs/reference/python.md").read_text()
    named = set(re.findall(r"\bconnito\.([a-z_]+)\.[a-z_]+\(?", page)) - {"nk"}
    assert {"library", "local", "audit"} <= named
    code = "import connito; print(sorted(name for name in {names} if not hasattr(connito, name)))"
    run = [sys.executable, "-c", code.format(names=sorted(named & set(connito._MODULES) | {"library", "errors"}))]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = connito.nonsense


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, connito; print([name for name in ('torch', 'transformers', 'grpc', 'nats') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


PACKAGES = ["connito", *(found.name for found in pkgutil.walk_packages(connito.__path__, "connito.") if found.ispkg)]


def exported(package: str) -> list[str]:
    return getattr(importlib.import_module(package), "__all__", [])


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_that_of_a_submodule(package: str) -> None:
    """`from package import name` would be the function or the module, by what was imported before."""
    modules = {found.name for found in pkgutil.iter_modules(importlib.import_module(package).__path__)}
    assert modules & set(exported(package)) == set()


def test_a_public_name_means_one_thing() -> None:
    """Packages may offer the same object under its name, but no two objects under one."""
    pytest.importorskip("torch")
    homes: dict[str, dict[str, object]] = {}
    for package in PACKAGES:
        for name in exported(package):
            homes.setdefault(name, {})[package] = getattr(importlib.import_module(package), name)
    assert len(homes) > 20
    assert {name: list(found) for name, found in homes.items() if len({id(o) for o in found.values()}) > 1} == {}


def test_what_is_offered_is_what_completion_shows() -> None:
    import connito.library as library

    assert set(dir(connito)) == {*connito.__all__, *connito._MODULES}
    assert set(dir(library)) == set(library.__all__)
    client = connito.Client()
    assert {"job", "library", "aio", "ban", "local", "close"} <= set(dir(client))
    assert "check" in dir(client.aio.job)
    assert dir(client.aio.job) == [name for name in dir(client.job) if not name.startswith("_")]
