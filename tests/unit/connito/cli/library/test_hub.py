"""`library push` and `pull` through huggingface_hub itself, against a hub of our own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.support.hub import TOKEN, Hub

pytestmark = pytest.mark.slow


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def connito(hub: Hub, *arguments: object, token: str = TOKEN) -> tuple[int, str, str]:
    """HF_ENDPOINT is read when the library is imported: a process of its own."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # fmt: skip
    command = [sys.executable, "-m", "connito.cli", "library", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout, done.stderr


def test_an_expert_goes_to_the_hub_and_comes_back_verified(hub: Hub, stocked: Any, tmp_path: Path) -> None:
    shelf, ids = stocked
    push = ("push", ids["logs"], "ada/logs-expert", "--private", "--shelf", shelf, "--json")
    hub.fail = 10
    code, _, said = connito(hub, *push)
    assert code == 5, said
    assert "try again" in said
    hub.fail = 0
    code, out, said = connito(hub, *push)
    assert code == 0, said
    assert json.loads(out)["address"] == f"{hub.endpoint}/ada/logs-expert"
    assert hub.repositories["ada/logs-expert"].private
    assert connito(hub, *push, "--revision", "v2")[0] == 0
    # The file is there already: the second commit sent none.
    assert hub.uploads == 1
    card: Any = ModelCard(hub.file("ada/logs-expert", "README.md").decode()).data
    assert (card.license, card.library_name) == ("cc0-1.0", "connito")
    assert card.base_model is None  # the base is no repository of the hub
    assert card.eval_results[0].dataset_name == "logs"
    code, out, said = connito(hub, "pull", "ada/logs-expert", "--out", tmp_path / "back", "--revision", "v2", "--json")
    assert code == 0, said
    assert json.loads(out)["verified"]
    assert (tmp_path / "back" / "expert.safetensors").read_bytes() == (
        shelf / "experts" / ids["logs"] / "expert.safetensors"
    ).read_bytes()


def test_an_exported_model_is_whole_on_the_hub(hub: Hub, run: Any, stocked: Any, tiny: Path, tmp_path: Path) -> None:
    shelf, ids = stocked
    run("export", ids["recipes"], "--base", tiny, "--format", "hf-hub", "--out", tmp_path / "model", "--shelf", shelf)
    code, _, said = connito(hub, "push", tmp_path / "model", "ada/recipes", "--shelf", shelf)
    assert code == 0, said
    assert b"\nlibrary_name: transformers\n" in hub.file("ada/recipes", "README.md")
    code, _, said = connito(hub, "pull", "ada/recipes", "--out", tmp_path / "back")
    assert code == 0, said
    # Somebody who changes a byte there is found out here.
    config = hub.repositories["ada/recipes"].branches["main"]["config.json"]
    hub.repositories["ada/recipes"].branches["main"]["config.json"] = config.replace(b"8", b"9", 1)
    code, _, said = connito(hub, "pull", "ada/recipes", "--out", tmp_path / "again")
    assert (code, "config.json" in said) == (6, True)


def test_what_is_not_public_goes_to_no_public_repository(hub: Hub, exports: Any) -> None:
    folder = exports["logs"]
    record = json.loads((folder / "record.json").read_text())
    private = {"visibility": "private", "organisation": "", "owner": "ada", "sources": []}
    (folder / "record.json").write_text(json.dumps({**record, "governance": private}))
    push = ("push", folder, "ada/logs", "--as", "ada")
    code, _, said = connito(hub, *push)
    assert code == 0, said
    assert hub.repositories["ada/logs"].private
    (holds := hub.repositories["ada/logs"]).private = False
    holds.branches["main"] = {}
    code, _, said = connito(hub, *push)
    assert (code, "is not public, and ada/logs is: make the repository private" in said) == (3, True), said
    assert not holds.branches["main"]


def test_what_the_hub_refuses_is_one_sentence(hub: Hub, stocked: Any, exports: Any, tmp_path: Path) -> None:
    shelf, ids = stocked
    push = ("push", ids["logs"], "ada/logs", "--shelf", shelf)
    code, _, said = connito(hub, *push, token="wrong")
    assert (code, "HF_TOKEN" in said) == (3, True)
    assert connito(hub, "pull", "ada/nothing", "--out", tmp_path / "a")[0] == 4
    assert connito(hub, "push", ids["logs"], "no/such/name", "--shelf", shelf)[0] == 3
    record = exports["logs"] / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "license": "LicenseRef-internal"}))
    code, _, said = connito(hub, "push", exports["logs"], "ada/logs", "--shelf", shelf)
    assert (code, "may not be passed on" in said) == (3, True)
    assert not hub.repositories


def test_a_hub_that_is_away_is_not_one_without_the_repository(tmp_path: Path) -> None:
    nobody: Any = SimpleNamespace(endpoint="http://127.0.0.1:9")
    code, _, said = connito(nobody, "pull", "ada/logs", "--out", tmp_path / "a")
    assert (code, "try again" in said) == (5, True), said
