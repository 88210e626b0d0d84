"""Folders as people have them: which of their files are the checkpoint, and what is said where that cannot be told."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.description import build_manifest
from connito.base.folders import rewrite, show
from connito.base.loading import load_full, load_tokenizer
from connito.data.checkpoint_files import find_checkpoint
from connito.errors import Invalid
from connito.workloads.rehearsal import config_of, same_everywhere
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import assert_as_transformers, assert_same, change, edit, published, theirs
from tests.unit.connito.cli.conftest import Call, call

__all__ = ["call"]

INDEX = "model.safetensors.index.json"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 123\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("sharded"), shard="60KB")


@pytest.fixture
def base(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "base"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


@pytest.mark.parametrize("count", [2, 4, 6])
def test_shards_of_an_older_save_are_not_read(shards: Path, tmp_path: Path, count: int) -> None:
    before = build_manifest(shards)
    stale = load_file(shards / sorted(shards.glob("model-0*"))[0].name)
    for number in range(1, count + 1):
        stale = {name: torch.zeros_like(tensor) for name, tensor in stale.items()}
        save_file(stale, shards / f"model-{number:05}-of-{count:05}.safetensors", {"format": "pt"})
    after = build_manifest(shards)
    assert after.digest == before.digest
    assert_as_transformers(shards)


def test_what_lies_in_a_training_folder_is_not_the_base(base: Path) -> None:
    before, weights = build_manifest(base), load_file(base / "model.safetensors")
    for name in (
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "optimizer.safetensors",
    ):
        save_file({k: torch.zeros_like(v) for k, v in weights.items()}, base / name, {"format": "pt"})
    for name in (
        "adapter_config.json",
        "trainer_state.json",
        "train_samples.json",
        "service_account.json",
        "all_results.json",
    ):
        (base / name).write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    for name in (
        "notes.txt",
        "requirements.txt",
        ".env",
        "id_rsa",
        "model.Q4_K_M.gguf",
        "pytorch_model.bin",
        "tokenization_x.py",
    ):
        (base / name).write_text("secret")
    for name in ("model.fp16.safetensors.index.json", "tf_model.h5", "rng_state.pth", "training_args.bin", "README.md"):
        (base / name).write_text("{}")
    for name in ("original", "onnx", ".git", "checkpoint-500"):
        (base / name).mkdir()
        shutil.copy(base / "model.safetensors", base / name)
    after = build_manifest(base)
    assert after.digest == before.digest
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert set(after.files) <= wanted | {"special_tokens_map.json", "chat_template.jinja"}
    (base / "adapter_config.json").unlink()  # Else transformers would load the adapter on top.
    assert_as_transformers(base)


def test_what_is_left_alone_is_said(base: Path, call: Call) -> None:
    change(base, lambda found: found | {"model.layers.2.eh_proj.weight": torch.ones(2)})
    for name in ("a.txt", "b.json", "notes.md", "trainer_state.json"):
        (base / name).write_text("{}")
    said = json.loads(call("base", "show", base, "--json").out)["left_alone"]
    assert said == {
        "files": ["a.txt", "b.json", "notes.md", "trainer_state.json"],
        "tensors": ["model.layers.2.eh_proj.weight"],
    }
    told = call("base", "show", base).out
    assert "files that are not part of it: a.txt, b.json, notes.md and 1 more" in told
    assert "tensors that are not part of it: model.layers.2.eh_proj.weight" in told


def test_a_whole_file_beside_an_index_of_other_files_is_not_guessed_at(shards: Path, whole: Path) -> None:
    shutil.copy(whole / "model.safetensors", shards)
    with pytest.raises(Invalid, match=r"which of them is the model cannot be told; remove"):
        show(shards)


def test_an_index_whose_shards_are_gone_gives_way(shards: Path, whole: Path) -> None:
    shutil.copy(whole / "model.safetensors", shards)
    for path in shards.glob("model-0*"):
        path.unlink()
    assert INDEX not in build_manifest(shards).files
    assert_as_transformers(shards)


def test_an_index_that_names_the_whole_file(base: Path) -> None:
    names = dict.fromkeys(load_file(base / "model.safetensors"), "model.safetensors")
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert_as_transformers(base)


def test_a_complete_series_or_one_file_of_another_name_needs_no_index(shards: Path, base: Path, tmp_path: Path) -> None:
    wanted = theirs(shards)
    (shards / INDEX).unlink()
    assert_same(load_full(shards), wanted)
    sorted(shards.glob("model-0*"))[1].unlink()
    with pytest.raises(Invalid, match="cannot be told"):
        find_checkpoint(shards)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "model.safetensors").rename(other / "weights.safetensors")
    assert_same(load_full(other), theirs(base))


def test_a_hubs_cache_is_read_through_its_links(shards: Path, tmp_path: Path) -> None:
    root = tmp_path / "models--someone--moe"
    snapshot = root / "snapshots" / ("ab" * 20)
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("ab" * 20)
    for path in shards.iterdir():
        blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    assert_as_transformers(snapshot)
    load_tokenizer(snapshot)
    with pytest.raises(Invalid, match=f"snapshots/{'ab' * 20}"):
        show(root)
    first = sorted(snapshot.glob("model-0*"))[0]
    first.resolve().unlink()
    with pytest.raises(Invalid, match=rf"lacks 1 of \d+ shards, first {first.name}"):
        show(snapshot)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(base: Path, name: str) -> None:
    (base / name).write_text(POINTER)
    with pytest.raises(Invalid, match=rf"{name} .* Git-LFS pointer.*git lfs pull"):
        show(base)


@pytest.mark.parametrize("shard", ["5GB", "60KB"])
def test_pickled_weights_are_written_anew(tmp_path: Path, shard: str) -> None:
    """As of older programs: one file, or several with an index. The judge loads the same folder."""
    source = published(tmp_path / "source", "deepseek_v3", shard=shard)
    base = tmp_path / "base"
    base.mkdir()
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            renamed = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
            torch.save(load_file(path), base / renamed)
        elif path.name == INDEX:
            text = path.read_text().replace('"model', '"pytorch_model').replace(".safetensors", ".bin")
            text = text.replace('"pytorch_model.layers', '"model.layers')
            (base / "pytorch_model.bin.index.json").write_text(text)
        else:
            shutil.copy(path, base)
    wanted = theirs(base)
    with pytest.raises(Invalid, match=r"PyTorch's own format.*--rewrite"):
        show(base)
    assert_same(load_full(base), wanted)
    rewrite(base, tmp_path / "out")
    assert_as_transformers(tmp_path / "out")
    assert_same(load_full(tmp_path / "out"), wanted)


class _Marker:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("was-run",)


def test_code_in_pickled_weights_is_not_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (base / "model.safetensors").unlink()
    torch.save({"x": _Marker()}, base / "pytorch_model.bin")
    with pytest.raises(Invalid, match="cannot be read"):
        load_full(base)
    assert not (tmp_path / "was-run").exists()


def _only(*names: str) -> Callable[[Path], None]:
    def leave(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_text("{}")

    return leave


def _index(**content: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, INDEX, **content)


def _far(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, INDEX, weight_map={"model.norm.weight": name})


def _copy_shard(folder: Path) -> None:
    first, second = (path.name for path in sorted(folder.glob("model-0*"))[:2])
    taken = load_file(folder / first) | load_file(folder / second)
    save_file(taken, folder / second, {"format": "pt"})


def _point_elsewhere(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = sorted(index["weight_map"])[0]
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    edit(folder, INDEX, weight_map={**index["weight_map"], name: other})


def _cut(by: int) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = sorted(folder.glob("model-0*"))[1]
        data = path.read_bytes()
        path.write_bytes(data[:-by] if by > 0 else data + b"\0" * -by)

    return cut


def _head(data: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        sorted(folder.glob("model-0*"))[0].write_bytes(data)

    return write


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (_only(), r"no config\.json.*save_pretrained"),
    "adapter alone": (_only("adapter_config.json", "adapter_model.safetensors"), "adapter, not a model; merge it"),
    "adapter with a config": (_only("config.json", "adapter_config.json", "adapter_model.safetensors"), "adapter"),
    "gguf": (_only("model.gguf"), r"model\.gguf, another format"),
    "gguf with a config": (_only("config.json", "model.gguf"), r"model\.gguf, another format"),
    "original": (_only("params.json", "consolidated.00.pth"), r"consolidated\.00\.pth, another format"),
    "variant": (_only("config.json", "model.fp16.safetensors.index.json"), "the variant model.fp16"),
    "config alone": (_only("config.json"), "it has no weights"),
    "out of the folder": (_far("../x.safetensors"), "not the name of a file beside it"),
    "absolute": (_far("/etc/passwd"), "not the name of a file beside it"),
    "of a folder": (_far("original/model.safetensors"), "not the name of a file beside it"),
    "hidden": (_far(".model.safetensors"), "not the name of a file beside it"),
    "no map": (_index(weight_map=[]), "names no file for any tensor"),
    "a map of numbers": (_index(weight_map={"a": 1}), "names no file for any tensor"),
    "index is no object": (lambda f: (f / INDEX).write_text("[1]"), "damaged"),
    "index is cut": (lambda f: (f / INDEX).write_text('{"weight_map": {'), "damaged"),
    "index nests": (lambda f: (f / INDEX).write_text("[" * 100_000), "damaged"),
    "shard lost": (lambda f: sorted(f.glob("model-0*"))[0].unlink(), r"lacks 1 of \d+ shards.*fetch it again"),
    "tensor in two shards": (_copy_shard, r"is in both model-.* and model-.*remove the file that is stale"),
    "index of another save": (_point_elsewhere, "which does not hold it"),
    "shard cut": (_cut(100), "damaged or incomplete.*copy it again"),
    "shard with more": (_cut(-100), "damaged or incomplete.*copy it again"),
    "shard empty": (_head(b""), "damaged or incomplete"),
    "huge header": (_head((1 << 40).to_bytes(8, "little") + b"{}"), "damaged or incomplete"),
    "header nests": (_head((200_000).to_bytes(8, "little") + b"[" * 200_000), "damaged or incomplete"),
    "html": (_head(b"<!DOCTYPE html><html><body>429 Too Many Requests</body></html>"), "damaged or incomplete"),
    "config cut": (lambda f: (f / "config.json").write_text('{"model_type": "qwen3_m'), "damaged"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "config nests": (lambda f: (f / "config.json").write_text('{"a":' * 100_000), "damaged"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_checkpoint_is_said_in_one_sentence(shards: Path, name: str) -> None:
    spoil, says = ODD[name]
    spoil(shards)
    with pytest.raises(Invalid, match=says) as caught:
        show(shards)
    assert "\n" not in str(caught.value)
    with pytest.raises(Invalid):
        load_full(shards)


def test_a_name_on_a_hub_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Invalid, match="hf download someone/tiny-moe"):
        show(Path("someone/tiny-moe"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_that_the_system_withholds(base: Path, call: Call, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def withheld(path: Path, *arguments: Any, **named: Any) -> Any:
        if path == base / name:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", withheld)
    done = call("base", "show", base)
    assert (done.code, done.out) == (5, "")
    remedy = "give this user the right to it, or become the user that it belongs to, then try again"
    assert done.err == f"connito: {base / name}: Permission denied; {remedy}\n"


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("hidden_size", -32, "negative dimension -32"),
        ("hidden_act", "foo", "it names 'foo', which the installed transformers does not know"),
        ("attn_implementation", "flash_attention_2", "take the field .* out of it, or install that"),
        ("num_experts_per_tok", 9, "sends each token to 9 experts, and model.layers.0.mlp.experts has 4"),
        ("num_experts_per_tok", 0, "sends each token to 0 experts"),
    ],
)
def test_a_configuration_that_no_model_can_be_made_of(base: Path, field: str, value: Any, said: str) -> None:
    edit(base, **{field: value})
    with pytest.raises(Invalid, match=said):
        show(base)
    for path in base.iterdir():
        if path.name != "config.json":
            path.unlink()
    with pytest.raises(Invalid, match=said):
        same_everywhere(config_of(base), 1)


def test_what_is_said_of_a_configuration_names_no_folder_of_ours(base: Path) -> None:
    (base / "config.json").write_bytes((base / "config.json").read_text().encode("utf-16"))
    with pytest.raises(Invalid, match=r"config\.json cannot be read: ") as caught:
        load_full(base)
    assert "/tmp" not in str(caught.value)


def test_a_tokenizer_that_makes_nothing_of_a_text(base: Path) -> None:
    (base / "tokenizer.json").unlink()
    (base / "vocab.json").write_text("{}")
    (base / "merges.txt").write_text("")
    edit(base, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(Invalid, match="knows no words, and makes nothing of a text"):
        show(base)
