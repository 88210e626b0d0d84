"""`library push` and `pull` through huggingface_hub itself, against a hub of our own."""

from __future__ import annotations

import hashlib
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
    push = ("push", ids["logs"], "ada/logs-expert", "--shelf", shelf, "--json")
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


def test_a_repository_is_private_unless_it_is_to_be_open(hub: Hub, stocked: Any) -> None:
    shelf, ids = stocked
    assert connito(hub, "push", ids["logs"], "ada/open", "--public", "--shelf", shelf)[0] == 0
    assert not hub.repositories["ada/open"].private


def test_only_the_files_of_an_expert_are_sent(hub: Hub, exports: Any) -> None:
    (exports["logs"] / "notes.txt").write_text("what nobody else should read")
    (exports["logs"] / "key.json").write_text("{}")
    assert connito(hub, "push", exports["logs"], "ada/logs")[0] == 0
    assert set(hub.repositories["ada/logs"].branches["main"]) <= {
        "README.md", "attestation.json", "expert.safetensors", "experts.svg", "losses.svg", "record.json",
    }  # fmt: skip


@pytest.fixture
def pushed(hub: Hub, stocked: Any) -> dict[str, bytes]:
    """The files of the repository `ada/logs`, which holds an expert."""
    shelf, ids = stocked
    assert connito(hub, "push", ids["logs"], "ada/logs", "--shelf", shelf)[0] == 0
    return hub.repositories["ada/logs"].branches["main"]


def test_a_cut_download_goes_on_with_what_is_missing(hub: Hub, pushed: dict[str, bytes], tmp_path: Path) -> None:
    hub.cut = 1
    code, _, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / "back")
    assert (code, hub.cut) == (0, 0), said
    hub.cut = 100
    code, _, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / "later")
    assert (code, "try again" in said) == (5, True), said
    hub.cut = hub.sent = 0
    code, _, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / "later")
    assert code == 0, said
    assert hub.sent == len(hub.file("ada/logs", "expert.safetensors")), "what was whole came once"


@pytest.mark.parametrize(
    "name", ["../outside.txt", "/tmp/outside.txt", "a/../../outside", "pytorch_model.bin", "load.py", "a/b.json"]
)
def test_what_the_record_does_not_name_is_not_taken(
    hub: Hub, pushed: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    pushed[name] = b"cos\nsystem\n(S'true'\ntR."
    code, out, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / "in" / "back")
    assert code == 0, said
    assert f"its record does not name it: {name!r}" in out
    assert not [path for path in tmp_path.rglob("*") if path.name == Path(name).name]


def test_a_record_that_names_a_program_or_a_way_out_is_refused(
    hub: Hub, run: Any, stocked: Any, tiny: Path, tmp_path: Path
) -> None:
    shelf, ids = stocked
    run("export", ids["recipes"], "--base", tiny, "--format", "hf", "--out", tmp_path / "model", "--shelf", shelf)
    assert connito(hub, "push", tmp_path / "model", "ada/recipes", "--shelf", shelf)[0] == 0
    files = hub.repositories["ada/recipes"].branches["main"]
    honest = json.loads(files["record.json"])
    evil = b"cos\nsystem\n(S'true'\ntR."
    for name, code, why in (
        ("pytorch_model.bin", 6, "may hold a program"),
        ("modeling.py", 6, "may hold a program"),
        ("../config.json", 3, "without a path"),
        ("a/config.json", 3, "without a path"),
    ):
        stated = {"digest": hashlib.sha256(evil).hexdigest(), "bytes": len(evil)}
        changed = {**honest, "files": {**honest["files"], name: stated}}
        files |= {"record.json": json.dumps(changed).encode(), name: evil}
        result = connito(hub, "pull", "ada/recipes", "--out", tmp_path / f"to-{code}-{len(name)}")
        assert (result[0], why in result[2]) == (code, True), result
        del files[name]


def test_more_than_the_record_says_is_refused_before_it_comes(
    hub: Hub, pushed: dict[str, bytes], tmp_path: Path
) -> None:
    for number, name in enumerate(("expert.safetensors", "record.json", "README.md")):
        hub.says, hub.sent = {name: 1 << 40}, 0
        code, _, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / str(number))
        assert (code, f"{name} of ada/logs has 1.10 TB" in said) == (6, True), said
        assert hub.sent < 1 << 14
    hub.says = {}
    record = json.loads(pushed["record.json"])
    for number, broken in enumerate(
        (b"{", b"[]", b"[" * 100_000, json.dumps({**record, "expert_id": "../x"}).encode())
    ):
        pushed["record.json"] = broken
        code, _, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / f"record-{number}")
        assert (code, "is no record of a library expert" in said) == (3, True), said
    del pushed["record.json"]
    code, _, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / "none")
    assert (code, "holds no record.json" in said) == (4, True), said


def test_an_expert_file_that_is_none_is_refused(hub: Hub, pushed: dict[str, bytes], tmp_path: Path) -> None:
    oid = pushed["expert.safetensors"][4:].decode()
    honest = hub.objects[oid]
    longest = (1 << 62).to_bytes(8, "little") + honest[8:]
    for number, bad in enumerate((longest, honest[:-1] + b"x", honest[:100], b"../../etc/passwd", b"")):
        hub.objects[oid] = bad
        code, _, said = connito(hub, "pull", "ada/logs", "--out", tmp_path / str(number))
        assert code in (3, 6), (number, said)
        assert "expert.safetensors" in said


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
