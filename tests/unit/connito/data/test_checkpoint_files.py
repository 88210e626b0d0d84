"""What is said of a path that is no checkpoint's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from connito.data.checkpoint_files import find_checkpoint
from connito.errors import NotFound


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


def said(path: Path) -> str:
    with pytest.raises(NotFound) as refused:
        find_checkpoint(path)
    return str(refused.value)


def test_a_folder_one_level_too_high_names_the_one_with_the_model(tmp_path: Path) -> None:
    inside = model(tmp_path / "tiny-1" / "model")
    assert f"the model is in {inside}: name that folder" in said(inside.parent)
    another = model(tmp_path / "tiny-1" / "older")
    assert f"models are in {inside}, {another}: name one of these" in said(inside.parent)
    assert "not a checkpoint" in said(tmp_path), "two levels are not searched"


def test_a_file_of_a_model_names_its_folder(tmp_path: Path) -> None:
    folder = model(tmp_path / "model")
    assert said(folder / "config.json").endswith(f"the folder of the model that it belongs to, {folder}")
