"""Whatever is wrong with a base, a probe or a budget is named, with the remedy, before any weight is computed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import Call

Spoil = Callable[[Path], None]


def edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def as_bytes(folder: Path) -> None:
    import torch

    rewrite(folder, lambda found: {n: t.to(torch.int8) if "experts." in n else t for n, t in found.items()})


def two_shards_one_lost(folder: Path) -> None:
    names = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def cut(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def dense(folder: Path) -> None:
    edit(folder, "config.json", mlp_only_layers=[0, 1, 2])
    rewrite(folder, lambda found: {n: t for n, t in found.items() if "experts" not in n})


def without_a_layers_experts(folder: Path) -> None:
    rewrite(folder, lambda found: {n: t for n, t in found.items() if "layers.2.mlp.experts" not in n})


def other_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def foreign_tokenizer(folder: Path) -> None:
    from connito.base.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<one>", "<more>"])
    tokenizer.save_pretrained(folder)


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


BASES: list[tuple[Spoil, int, str, str]] = [
    (lambda f: edit(f, "config.json", model_type="alien"), 3, "family 'alien'", "transformers"),
    (
        lambda f: edit(f, "config.json", quantization_config={"quant_method": "fp8"}),
        3,
        "quantised (fp8)",
        "not quantised",
    ),
    (as_bytes, 3, "of type I8", "convert"),
    (two_shards_one_lost, 4, "model-00002-of-00002", "fetch it again"),
    (cut, 3, "ends inside", "copy it again"),
    (dense, 3, "dense model", "connito base build"),
    (without_a_layers_experts, 3, "its config.json describes", "copy both again"),
    (other_weights, 4, "pytorch_model.bin", "safe_serialization"),
    (foreign_tokenizer, 3, "belongs to another model", "copy the tokenizer"),
    (no_tokenizer, 3, "no tokenizer", "beside its weights"),
    (no_config, 4, "no config.json", "Hugging Face layout"),
]


@pytest.mark.parametrize("verb", ["base show", "base import", "select"])
@pytest.mark.parametrize(("spoil", "code", "cause", "remedy"), BASES, ids=[case[2] for case in BASES])
def test_a_base_that_cannot_be_used(
    verb: str,
    spoil: Spoil,
    code: int,
    cause: str,
    remedy: str,
    tiny: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    spoil(base)
    monkeypatch.setattr("connito.base.loading.load_full", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "t.txt").write_text("words " * 100)
    arguments = ["select", "--base", base, "--data", tmp_path / "t.txt"] if verb == "select" else [*verb.split(), base]
    done = call(*arguments)
    assert done.code == code, done.err
    assert cause in done.err
    assert remedy in done.err
    assert "Traceback" not in done.err


PROBES: list[tuple[str, list[str], int, str]] = [
    ("", [], 3, "is empty"),
    ("few", [], 3, "at least 40 tokens"),
    ("plenty " * 50, ["--threshold", "1.5"], 3, "at most 1"),
    ("plenty " * 50, ["--threshold", "0"], 3, "above 0"),
    ("plenty " * 50, ["--max-bytes", "10"], 3, "raise --max-bytes"),
    ("plenty " * 50, ["--max-vram", "10"], 3, "raise --max-vram"),
    ("plenty " * 50, ["--max-experts", "-1"], 3, "below zero"),
    ("plenty " * 50, ["--scope", "town"], 3, "global or layer"),
    ("plenty " * 50, ["--method", "guess"], 3, "esft-token"),
    ("plenty " * 50, ["--method", "differential"], 3, "--general"),
    ("plenty " * 50, ["--contested", "lottery"], 3, "share, duplicate, exclusive"),
    ("plenty " * 50, ["--general", "none.txt"], 4, "none.txt"),
    ("plenty " * 50, ["--earlier", "t.txt"], 3, "--base"),
]


@pytest.mark.parametrize(("text", "options", "code", "says"), PROBES, ids=[case[3] for case in PROBES])
def test_a_probe_or_a_budget_that_cannot_be(
    text: str,
    options: list[str],
    code: int,
    says: str,
    tiny: Path,
    tmp_path: Path,
    call: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(text)
    done = call("select", "--base", tiny, "--data", "t.txt", *options)
    assert done.code == code, done.err
    assert says in done.err


def test_text_of_several_domains_is_routed_and_selected_together(tiny: Path, tmp_path: Path, call: Call) -> None:
    for name in ("abc", "xyz", "other"):
        (tmp_path / name).write_text(f"{name} " * 200)
    both = ["--domain", f"abc={tmp_path / 'abc'}", "--domain", f"xyz={tmp_path / 'xyz'}"]
    out = tmp_path / "s.safetensors"
    done = call(
        "select", "--base", tiny, *both, "--general", tmp_path / "other", "--threshold", "0.5", "--helpers", "1",
        "--diagnostics", "--effects", "2", "--plots", tmp_path / "plots", "--save-statistics", out, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert document["domains"].keys() == {"abc", "xyz"}
    assert {"overlap", "utilisation", "causal_effect", "top1_perplexity_ratio"} <= document["diagnostics"].keys()
    assert len(document["probes"]) == 2
    assert (tmp_path / "plots" / "causal.svg").is_file()

    # What was saved selects the same without the model.
    saved = [f"{name}={tmp_path / f's.{name}.safetensors'}" for name in ("abc", "xyz")]
    again = call("select", "--domain", saved[0], "--domain", saved[1], "--threshold", "0.5", "--json")
    assert json.loads(again.out)["layers"] == document["layers"]
    merged = call("select", "--statistics", saved[0][4:], "--statistics", saved[1][4:], "--json")
    assert json.loads(merged.out)["probes"] == document["probes"]
    twice = call("select", "--statistics", saved[0][4:], "--statistics", saved[0][4:])
    assert twice.code == 3
    assert "would count twice" in twice.err


def test_statistics_of_another_base_are_refused(tiny: Path, tmp_path: Path, call: Call) -> None:
    import torch

    (tmp_path / "t.txt").write_text("words " * 200)
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    draw = torch.Generator().manual_seed(1)
    rewrite(
        other,
        lambda found: {
            n: torch.randn(t.shape, generator=draw) if n.endswith("mlp.gate.weight") else t for n, t in found.items()
        },
    )
    out = tmp_path / "s.safetensors"
    assert call("select", "--base", tiny, "--data", tmp_path / "t.txt", "--save-statistics", out).code == 0
    done = call("select", "--base", other, "--data", tmp_path / "t.txt", "--general", out)
    assert done.code == 3
    assert "another model" in done.err
