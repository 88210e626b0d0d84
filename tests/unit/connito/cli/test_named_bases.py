"""`--base` takes a folder, or the name of a base that was built on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.base.recipes import cached_base, called
from connito.cli.library.options import base_folder


def test_a_name_is_the_base_that_was_built_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONNITO_CACHE_DIR", str(tmp_path / "cache"))
    assert base_folder("tiny") == Path("tiny"), "it is not built"
    built = cached_base("tiny") / "model"
    built.mkdir(parents=True)
    assert base_folder("tiny") == built
    assert base_folder("mine") == Path("mine")
    (tmp_path / "tiny").mkdir()
    assert base_folder("tiny") == Path("tiny"), "a folder of that name is meant where there is one"


def test_a_base_is_called_what_its_recipe_is_or_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONNITO_CACHE_DIR", str(tmp_path / "cache"))
    (cached_base("tiny") / "model").mkdir(parents=True)
    assert called(base_folder("tiny")) == "tiny"
    (tmp_path / "mine").mkdir()
    assert called(Path("mine")) == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert called(Path()) == "mine"
