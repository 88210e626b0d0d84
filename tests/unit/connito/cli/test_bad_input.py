"""Whatever is wrong with a base, a probe or a budget is named, with the remedy, before any weight is computed with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.connito.cli.conftest import Call

Spoil = Callable[[Path], None]


def edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
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
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, mlp_only_layers=[0, 1, 2])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


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
    (as_bytes, 3, "of type I8", "convert"),
    (two_shards_one_lost, 4, "model-00002-of-00002", "fetch it again"),
    (cut, 3, "damaged or incomplete", "copy it again"),
    (dense, 3, "dense model", "connito base build"),
    (without_a_layers_experts, 3, "layers.2.mlp.experts.down_proj is missing", "fetch it again"),
    (other_weights, 3, "pytorch_model.bin", "--rewrite"),
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
    ("", [], 3, "holds no text"),
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
    out = tmp_path / "not there yet" / "s.safetensors"
    assert call("select", "--base", tiny, "--data", tmp_path / "t.txt", "--save-statistics", out).code == 0
    done = call("select", "--base", other, "--data", tmp_path / "t.txt", "--general", out)
    assert done.code == 3
    assert "another model" in done.err


@pytest.fixture
def branches(tmp_path: Path) -> dict[str, Path]:
    """A dense seed, two branches of it, and their texts."""
    import copy

    import torch
    from connito.base.checkpoint import save_checkpoint
    from connito.base.tiny import tiny_texts, tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=256, max_position_embeddings=512,
    )  # fmt: skip
    seed = LlamaForCausalLM(config).eval()
    folders = {"seed": save_checkpoint(seed, tmp_path / "seed", tokenizer())}
    for name in ("recipes", "logs"):
        mine = copy.deepcopy(seed)
        with torch.no_grad():
            for parameter in mine.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape))
        folders[name] = save_checkpoint(mine, tmp_path / name, tokenizer())
        (tmp_path / f"{name}.txt").write_text("\n\n".join(tiny_texts(name, 0, 200)))
    return folders


@pytest.mark.parametrize("steps", [0, 2])
def test_branches_become_experts_and_the_base_is_ready_to_select_from(
    steps: int, branches: dict[str, Path], tmp_path: Path, call: Call
) -> None:
    import torch
    from safetensors.torch import load_file

    out = tmp_path / "joined"
    done = call(
        "base", "build", "--from", branches["seed"], "--branch", f"recipes={branches['recipes']}", "--branch",
        f"logs={branches['logs']}", "--data", tmp_path / "recipes.txt", "--data", tmp_path / "logs.txt",
        "--moe-layers", "2", "--top-k", "1", "--router-steps", steps, "--out", out, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["experts"] == {"1": 2, "2": 2}
    joined, logs = load_file(out / "model.safetensors"), load_file(branches["logs"] / "model.safetensors")
    assert joined["model.layers.2.mlp.experts.down_proj"][1].equal(logs["model.layers.2.mlp.down_proj.weight"])
    assert torch.isfinite(joined["model.layers.2.mlp.gate.weight"]).all()
    chosen = call("select", "--base", out, "--data", tmp_path / "logs.txt", "--threshold", "0.6", "--json")
    assert chosen.code == 0, chosen.err
    if not steps:
        assert {experts[0] for experts in json.loads(chosen.out)["layers"].values()} == {1}, (
            "logs go to the branch of logs"
        )


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--branch", "recipes"], 3, "NAME=DIR"),
        (["--branch", "recipes=nowhere"], 4, "nowhere"),
        (["--branch", "recipes={recipes}", "--branch", "logs={logs}"], 3, "give --data NAME.txt"),
        (["--branch", "recipes={recipes}", "--data", "{tmp}/recipes.txt"], 3, "every branch needs text"),
    ],
)
def test_branches_that_cannot_be_joined(
    options: list[str], code: int, says: str, branches: dict[str, Path], tmp_path: Path, call: Call
) -> None:
    values = {**{name: str(path) for name, path in branches.items()}, "tmp": str(tmp_path)}
    filled = [option.format(**values) for option in options]
    done = call("base", "build", "--from", branches["seed"], *filled, "--out", tmp_path / "out")
    assert done.code == code, done.err
    assert says in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed
def test_a_checkpoint_with_names_of_its_own_is_read_and_written_anew(tmp_path: Path, call: Call) -> None:
    from connito.base.folders import rewrite
    from connito.base.tiny import tokenizer
    from safetensors import safe_open
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    config = GraniteMoeConfig(
        vocab_size=258, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, eos_token_id=256, pad_token_id=257,
    )  # fmt: skip
    GraniteMoeForCausalLM(config).save_pretrained(tmp_path / "theirs")
    tokenizer().save_pretrained(tmp_path / "theirs")
    with safe_open(tmp_path / "theirs" / "model.safetensors", framework="pt") as file:
        assert not any(".experts." in name for name in file.keys())  # noqa: SIM118 - not a mapping
    theirs = call("base", "show", tmp_path / "theirs", "--json")
    assert json.loads(theirs.out)["experts"] == {"0": 4, "1": 4}, theirs.err
    rewrite(tmp_path / "theirs", tmp_path / "ours")
    shown = call("base", "show", tmp_path / "ours", "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["experts"] == {"0": 4, "1": 4}
