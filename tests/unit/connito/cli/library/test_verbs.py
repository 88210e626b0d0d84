"""The library's verbs from end to end on the tiny base: deposit, search, compose, remove, export, verify, extract, prune."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import connito
import pytest
import torch
from connito.base.loading import load_full
from connito.base.tiny import tiny_texts
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.library.record import encode
from connito.library.shelf import Shelf
from connito.moe.rows import fingerprint
from transformers import AutoModelForCausalLM

from tests.support.models import Sequences

pytestmark = pytest.mark.slow


@pytest.fixture
def recipes_text(tmp_path: Path) -> Any:
    path = tmp_path / "recipes.txt"
    path.write_text("\n".join(tiny_texts("recipes", 77, 16)))
    return path


def test_search_by_words_and_by_example(run: Any, stocked: Any, tiny: Path, recipes_text: Any) -> None:
    shelf, ids = stocked
    assert [e["expert_id"] for e in run("search", "generated", "poems", "--shelf", shelf)["experts"]] == [ids["poems"]]
    like = run("search", "--like", recipes_text, "--base", tiny, "--measure", 2, "--shelf", shelf)["experts"]
    assert like[0]["expert_id"] == ids["recipes"]
    assert like[0]["measured"] > 0
    assert [row["measured"] is None for row in like] == [False, False, True]
    with pytest.raises(Invalid, match="--base"):
        run("search", "--like", recipes_text, "--shelf", shelf)


def test_compose_verify_remove(run: Any, stocked: Any, tiny: Path, tmp_path: Path) -> None:
    shelf, ids = stocked
    names = [ids["recipes"], ids["logs"], ids["poems"]]
    out = tmp_path / "all"
    record = run(
        "compose", *names, "--base", tiny, "--out", out, "--method", "ties", "--density", 0.5, "--shelf", shelf
    )
    assert record["license"] == "CC-BY-4.0 AND CC0-1.0"
    assert {(c["layer"], c["expert"]) for c in record["derived"]["settings"]["conflicts"]} == {(2, 1), (2, 2), (3, 4)}
    assert sum(row["share"] for row in record["contributors"]) == pytest.approx(1)
    assert record["governance"]["sources"] == ["corpus-logs", "corpus-poems", "corpus-recipes"]
    again = run("compose", *names[::-1], "--base", tiny, "--out", tmp_path / "again", "--method", "ties", "--density", 0.5,
                "--shelf", shelf)  # fmt: skip
    assert again["expert"]["digest"] == record["expert"]["digest"]
    assert "recomputed" in run("verify", out, "--base", tiny, "--shelf", shelf)["verified"][1]
    model = load_full(tiny)
    before = fingerprint(model)
    loaded = connito.load_expert(model, out)
    loaded.remove()
    assert fingerprint(model) == before
    made = run("deposit", out, "--shelf", shelf)["expert_id"]
    less = run("remove", made, ids["logs"], "--base", tiny, "--out", tmp_path / "less", "--shelf", shelf)
    fresh = run("compose", ids["recipes"], ids["poems"], "--base", tiny, "--out", tmp_path / "fresh", "--method", "ties",
                "--density", 0.5, "--shelf", shelf)  # fmt: skip
    assert less["expert"]["digest"] == fresh["expert"]["digest"]


def test_what_lies_in_a_folder_is_not_written_over(run: Any, stocked: Any, tiny: Path, tmp_path: Path) -> None:
    shelf, ids = stocked
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for out, why in ((mine, "mine is not empty: choose another folder"), (mine / "notes.txt", "notes.txt is a file")):
        to = ["--base", tiny, "--out", out, "--shelf", shelf]
        for verb in (
            ["compose", ids["recipes"], ids["poems"], *to],
            ["cluster", ids["recipes"], ids["poems"], "--count", 1, *to],
            ["export", ids["recipes"], *to],
            ["export", ids["recipes"], "--out", out, "--shelf", shelf],
        ):
            with pytest.raises(Invalid, match=why):
                run(*verb)
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


def test_a_tampered_composition_is_found_out(run: Any, stocked: Any, tiny: Path, tmp_path: Path) -> None:
    shelf, ids = stocked
    out = tmp_path / "two"
    run("compose", ids["recipes"], ids["poems"], "--base", tiny, "--out", out, "--shelf", shelf)
    record = json.loads((out / "record.json").read_text())
    record["derived"]["settings"] |= {"method": "ties", "density": 0.1}
    (out / "record.json").write_bytes(encode(record))
    with pytest.raises(VerificationFailed, match="recomputed from its parents"):
        run("verify", out, "--base", tiny, "--shelf", shelf)
    data = bytearray((out / "expert.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "expert.safetensors").write_bytes(data)
    with pytest.raises(VerificationFailed, match="digest"):
        run("verify", out, "--shelf", shelf)


def test_weights_learned_on_a_few_texts_favour_their_domain(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, recipes_text: Any
) -> None:
    shelf, ids = stocked
    record = run("compose", ids["recipes"], ids["logs"], "--base", tiny, "--out", tmp_path / "hub", "--learn", recipes_text,
                 "--shelf", shelf)  # fmt: skip
    weights = {parent["expert_id"]: parent["weight"] for parent in record["derived"]["parents"]}
    assert weights[ids["recipes"]] > abs(weights[ids["logs"]])


def test_terms_and_standings_are_checked_and_use_is_metered(run: Any, stocked: Any, tiny: Path, tmp_path: Path) -> None:
    shelf, ids = stocked
    assert run("export", ids["logs"], "--out", tmp_path / "home", "--shelf", shelf)["attribution"] == []
    assert "leaves no trace" in run("verify", tmp_path / "home", "--base", tiny, "--shelf", shelf)["verified"][1]
    run("mark", ids["logs"], "yanked", "--reason", "leak", "--shelf", shelf)
    with pytest.raises(Invalid, match="was yanked: leak"):
        run("export", ids["logs"], "--out", tmp_path / "again", "--shelf", shelf)
    run("mark", "corpus-poems", "opted-out", "--reason", "asked", "--shelf", shelf)
    with pytest.raises(Invalid, match="opted out"):
        run("compose", ids["poems"], ids["recipes"], "--base", tiny, "--out", tmp_path / "no", "--shelf", shelf)
    with Shelf(shelf).index() as index:
        assert index.usage(ids["logs"]) == {"export": 1}
    with pytest.raises(NotFound):
        run("export", "nobody-1", "--out", tmp_path / "none", "--shelf", shelf, "--data-dir", tmp_path / "nowhere")


def test_the_whole_model_with_an_expert_in_it_loads_in_stock_transformers(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, sequences: Sequences
) -> None:
    shelf, ids = stocked
    out = tmp_path / "whole"
    run("export", ids["recipes"], "--base", tiny, "--out", out, "--shelf", shelf)
    ids_ = torch.from_numpy(sequences("recipes", 1, 60)[:, :-1].astype("int64"))
    model = load_full(tiny)
    connito.load_expert(model, shelf / "experts" / ids["recipes"])
    with torch.inference_mode():
        stock = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=ids_).logits
        torch.testing.assert_close(stock, model(input_ids=ids_).logits, rtol=1e-4, atol=1e-4)
    assert run("verify", out)["verified"]
    assert ids["recipes"] in run("verify", out, "--base", tiny, "--shelf", shelf)["verified"][1]


def test_extract_and_prune_write_verified_checkpoints(run: Any, tiny: Path, tmp_path: Path, recipes_text: Any) -> None:
    small = run(
        "extract",
        "--base",
        tiny,
        "--data",
        recipes_text,
        "--out",
        tmp_path / "small",
        "--per-layer",
        3,
        "--margin",
        1.0,
    )
    assert [len(experts) for experts in small["experts"].values()] == [3, 3]
    assert "every tensor is the base's own" in run("verify", tmp_path / "small", "--base", tiny)["verified"]
    pruned = run("prune", "--base", tiny, "--data", recipes_text, "--out", tmp_path / "pruned", "--method", "router-weighted",
                 "--max-experts", 5)  # fmt: skip
    assert [len(experts) for experts in pruned["experts"].values()] == [2, 2]
    dense = run(
        "prune", "--base", tiny, "--data", recipes_text, "--out", tmp_path / "dense", "--method", "task", "--dense"
    )
    assert dense["experts"] == {}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dense").config.model_type == "llama"
    with pytest.raises(Invalid, match="pruning needs a size"):
        run("prune", "--base", tiny, "--data", recipes_text, "--out", tmp_path / "x")


def test_python_does_what_the_commands_do(run: Any, stocked: Any, tiny: Path, tmp_path: Path) -> None:
    from connito import library

    shelf, ids = stocked
    here = library.Holdings(shelf=shelf)
    assert [row["expert_id"] for row in library.list(here)] == list(ids.values())
    assert library.search("poems", library=here)[0].to_json() == run("search", "poems", "--shelf", shelf)["experts"][0]
    options = library.ComposeOptions(method="ties", density=0.5)
    made = library.compose([ids["recipes"], ids["logs"]], tiny, tmp_path / "python", options, here)
    told = run("compose", ids["recipes"], ids["logs"], "--base", tiny, "--out", tmp_path / "command", "--method", "ties",
               "--density", 0.5, "--shelf", shelf)  # fmt: skip
    assert made.record["expert"] == told["expert"]
    assert library.verify(tmp_path / "python", tiny, library=here)[1].startswith("recomputed from its 2 parents")
    with pytest.raises(Invalid, match="2 weights for 1 expert:"):
        library.compose([ids["logs"]], tiny, tmp_path / "no", library.ComposeOptions(weights=[1.0, 2.0]), here)


@pytest.mark.parametrize("layout", ["hf-hub", "gguf", "delta"])
def test_an_expert_is_exported_to_what_people_run(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, layout: str
) -> None:
    shelf, ids = stocked
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(tiny, base)
    (base / "LICENSE").write_text("as you like")
    (base / "generation_config.json").write_text('{"temperature": 0.3}')
    run("export", ids["recipes"], "--base", base, "--out", out, "--format", layout, "--shelf", shelf)
    there = {path.name for path in out.iterdir()}
    assert {"README.md", "record.json"} <= there
    if layout == "delta":
        assert "expert.safetensors" in there
        return
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert (out / "LICENSE").read_text() == "as you like"
    assert run("verify", out)["verified"]
    card = (out / "README.md").read_text()
    assert f"`base` with `{ids['recipes']}` in it" in card
    assert "## What it changes" not in card
    use = "llama-cli --model recipes-export" if layout == "gguf" else "AutoModelForCausalLM.from_pretrained("
    assert use in card.partition("## Use")[2]
    if layout == "hf-hub":
        assert ids["recipes"] in run("verify", out, "--base", base, "--shelf", shelf)["verified"][1]


def test_a_whole_model_needs_its_base_and_a_known_format(run: Any, stocked: Any, tmp_path: Path) -> None:
    shelf, ids = stocked
    for layout, why in (("gguf", "add --base"), ("onnx", "no format is called")):
        with pytest.raises(Invalid, match=why):
            run("export", ids["recipes"], "--out", tmp_path / "out", "--format", layout, "--shelf", shelf)
    assert not (tmp_path / "out").exists()
