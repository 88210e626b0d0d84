"""The library's other verbs from end to end on the tiny base: upgrade, cluster, route, grow, join, prune, skip, list, ledger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from connito.base.loading import load_full
from connito.base.tiny import tiny_texts
from connito.cli.library import app
from connito.client import Client
from connito.curation import example
from connito.curation.holdings import Holdings
from connito.errors import Invalid, NotFound, VerificationFailed
from connito.experts.compose import base_rows, read_part
from connito.experts.flex import load_addition
from connito.experts.measure import loss
from connito.experts.routing import Routing, variants_of
from connito.library.governance import Standing
from connito.library.hits import Hit
from connito.library.shelf import Shelf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tests.support.models import Sequences

pytestmark = pytest.mark.slow


@pytest.fixture
def texts(tmp_path: Path) -> Any:
    made = {}
    for number, domain in enumerate(("recipes", "logs", "poems", "ledgers")):
        made[domain] = tmp_path / f"{domain}.txt"
        made[domain].write_text("\n".join(tiny_texts(domain, 77 + number, 16)))
    return made


def test_list_show_and_ledger_need_no_platform(run: Any, stocked: Any, tmp_path: Path) -> None:
    shelf, ids = stocked
    nowhere = tmp_path / "nowhere"
    rows = run("list", "--shelf", shelf, "--data-dir", nowhere)["experts"]
    assert [row["expert_id"] for row in rows] == list(ids.values())
    assert run("show", ids["poems"], "--shelf", shelf)["record"]["domain"] == "poems"
    assert run("show", shelf / "experts" / ids["poems"])["expert_id"] == ids["poems"]
    run("export", ids["poems"], "--out", tmp_path / "a", "--shelf", shelf)
    run("export", ids["poems"], "--out", tmp_path / "b", "--shelf", shelf)
    ledger = run("ledger", ids["poems"], "--shelf", shelf)
    assert (ledger["uses"], ledger["credited"]) == ({"export": 2}, {"U-poems": 2})


def test_a_composition_tells_what_it_was_measured_to_do_and_credits_its_parts(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, texts: Any
) -> None:
    shelf, ids = stocked
    measure = [f"--measure={domain}={path}" for domain, path in texts.items()]
    out = tmp_path / "two"
    asked = ["compose", ids["recipes"], ids["poems"], "--base", tiny, *measure, "--shelf", shelf]
    record = run(*asked, "--out", out)
    told = CliRunner().invoke(app, [*map(str, asked), "--out", str(tmp_path / "told")]).stdout
    for row in record["losses"]:
        assert f"  {row['domain']}: {row['before']:.4f} → {row['after']:.4f} nats per token" in told
    rows = {row["domain"]: row for row in record["losses"]}
    assert set(rows) == set(texts)
    for domain in ("recipes", "poems"):
        assert rows[domain]["after"] < rows[domain]["before"]
        assert rows[domain]["change_low"] < rows[domain]["after"] - rows[domain]["before"] < rows[domain]["change_high"]
    assert (out / "losses.svg").is_file()
    assert run("ledger", ids["recipes"], "--shelf", shelf)["uses"] == {"compose": 2}


def test_an_upgrade_replaces_one_and_holds_the_others(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, texts: Any
) -> None:
    shelf, ids = stocked
    whole = tmp_path / "whole"
    made = run("compose", ids["logs"], ids["poems"], "--base", tiny, "--out", whole, "--shelf", shelf)["expert_id"]
    run("deposit", whole, "--shelf", shelf)
    arguments = ["--base", tiny, "--data", texts["recipes"], "--shelf", shelf, "--out", tmp_path / "better"]
    record = run("upgrade", made, ids["logs"], ids["recipes"], *arguments, f"--other=poems={texts['poems']}",
                 "--margin", 0.05)  # fmt: skip
    settings = record["derived"]["settings"]
    assert settings["after"]["recipes"] < settings["before"]["recipes"]
    parents = {parent["expert_id"]: parent["digest"] for parent in record["derived"]["parents"]}
    assert set(parents) == {ids["recipes"], ids["poems"]}
    assert "recomputed" in run("verify", tmp_path / "better", "--base", tiny, "--shelf", shelf)["verified"][1]
    with pytest.raises(Invalid, match=r"no upgrade|costs"):
        run("upgrade", made, ids["logs"], ids["recipes"], "--base", tiny, "--data", texts["poems"], "--shelf", shelf,
            "--out", tmp_path / "worse", f"--other=logs={texts['logs']}", "--margin", 0.0)  # fmt: skip
    with pytest.raises(NotFound, match="is not in"):
        run("upgrade", made, "nobody-1", ids["recipes"], *arguments)


def test_clusters_are_merged_and_recompute(run: Any, stocked: Any, tiny: Path, tmp_path: Path) -> None:
    shelf, ids = stocked
    out = tmp_path / "clusters"
    found = run("cluster", *ids.values(), "--base", tiny, "--count", 2, "--out", out, "--shelf", shelf)
    assert sorted(name for group in found["clusters"] for name in group) == sorted(ids.values())
    assert len(found["written"]) == 2
    for made in found["written"]:
        assert "recomputed" in run("verify", made["folder"], "--base", tiny, "--shelf", shelf)["verified"][1]


def test_a_group_is_trained_anew_on_its_members_texts(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, texts: Any
) -> None:
    shelf, ids = stocked
    given = [part for domain in ids for part in ("--text", f"{domain}={texts[domain]}")]
    found = run("cluster", *ids.values(), "--base", tiny, "--count", 1, "--out", tmp_path / "one", "--shelf", shelf, *given,
                "--steps", 2)  # fmt: skip
    record = json.loads((tmp_path / "one" / "0" / "record.json").read_text())
    assert record["expert_id"] == found["written"][0]["expert_id"]
    assert record["derived"]["verb"] == "cluster"
    assert record["derived"]["settings"]["steps"] == 2


def test_routing_is_measured_kept_and_one_hot_is_the_single_expert(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, texts: Any
) -> None:
    shelf, ids = stocked
    names, file = [ids["recipes"], ids["logs"]], tmp_path / "routing.safetensors"
    measure = [f"--measure={domain}={texts[domain]}" for domain in ("recipes", "logs")]
    common = ["--base", tiny, "--shelf", shelf, *measure]
    hot = run("route", *names, *common, "--method", "one-hot:1")["losses"]
    assert hot["routed"] == hot[ids["logs"]]
    trained = run("route", *names, *common, "--method", "molora", "--train", texts["recipes"], "--train", texts["logs"],
                  "--out", file)["losses"]  # fmt: skip
    assert sum(trained["routed"].values()) < sum(trained["base"].values())
    model = load_full(tiny)
    parts = [read_part(shelf / "experts" / name) for name in names]
    origin = base_rows(model, parts)
    routing = Routing.load(file)
    ids_ = torch.arange(20)[None]
    with variants_of(model, parts, origin, routing), torch.inference_mode():
        once = model(input_ids=ids_).logits
    with variants_of(model, parts, origin, Routing.load(file)), torch.inference_mode():
        assert torch.equal(once, model(input_ids=ids_).logits)
    with pytest.raises(Invalid, match="other experts"), variants_of(model, parts[::-1], origin, routing):
        pass


def test_additions_are_grown_joined_in_any_order_and_left_out(run: Any, tiny: Path, tmp_path: Path, texts: Any) -> None:
    files = []
    for domain in ("recipes", "logs"):
        files.append(tmp_path / f"{domain}.safetensors")
        run("grow", domain, "--base", tiny, "--data", texts[domain], "--anchor", texts["ledgers"], "--out", files[-1],
            "--steps", 12, "--learning-rate", 0.003)  # fmt: skip
    measure = [f"--measure={domain}={texts[domain]}" for domain in ("recipes", "logs")]
    record = run("join", *files, "--base", tiny, "--out", tmp_path / "both", *measure)
    run("join", *files[::-1], "--base", tiny, "--out", tmp_path / "turned")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("both", "turned")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(row["after"] < row["before"] for row in record["losses"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "both").config.num_experts == 10
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1
    files[0].write_bytes(data)
    with pytest.raises(VerificationFailed, match="not those that were trained"):
        load_addition(files[0])


@pytest.mark.parametrize("method", ["zeros", "low-rank"])
def test_thinned_models_load_and_are_library_records(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, texts: Any, method: Any
) -> None:
    shelf, ids = stocked
    out = tmp_path / "thin"
    record = run("prune", "--base", tiny, "--data", texts["recipes"], "--out", out, "--method", method, "--share", 0.6,
                 "--with", ids["recipes"], "--shelf", shelf, f"--measure=logs={texts['logs']}")  # fmt: skip
    assert [row["domain"] for row in record["losses"]] == ["recipes", "logs"]
    assert record["derived"]["parents"][0]["expert_id"] == ids["recipes"]
    assert record["contributors"][0]["miner"] == "U-recipes"
    assert AutoModelForCausalLM.from_pretrained(out).config.num_experts == 8
    assert (out / "factors.safetensors").is_file() == (method == "low-rank")
    name = run("deposit", out, "--shelf", shelf)["expert_id"]
    assert run("show", name, "--shelf", shelf)["record"]["license"] == "CC-BY-4.0"
    assert run("search", "prune", "--shelf", shelf)["experts"][0]["expert_id"] == name
    assert run("verify", name, "--shelf", shelf)["verified"]
    copied = run("export", name, "--out", tmp_path / "home", "--shelf", shelf)
    assert copied["expert_id"] == name
    shutil.copy(out / "config.json", out / "stray.json")
    with pytest.raises(VerificationFailed, match="stray"):
        run("verify", out)


def test_skipping_says_what_it_saves_and_costs(run: Any, tiny: Path, texts: Any) -> None:
    found = run("skip", "--base", tiny, "--data", texts["recipes"])
    assert set(found["betas"]) == {"2", "3"}
    assert 0 < found["skipped_share"] < 0.5
    none = run("skip", "--base", tiny, "--data", texts["recipes"], "--beta", 0)
    assert none["skipped_share"] == 0
    assert none["measured"]["skipping"] == none["measured"]["full"]


def test_removing_one_hurts_its_own_domain_only(
    run: Any, stocked: Any, tiny: Path, tmp_path: Path, sequences: Sequences
) -> None:
    import connito

    shelf, ids = stocked
    run("compose", *ids.values(), "--base", tiny, "--out", tmp_path / "all", "--shelf", shelf)
    run("deposit", tmp_path / "all", "--shelf", shelf)
    made = json.loads((tmp_path / "all" / "record.json").read_text())["expert_id"]
    run("remove", made, ids["poems"], "--base", tiny, "--out", tmp_path / "less", "--shelf", shelf)
    model, losses = load_full(tiny), []
    held = {domain: sequences(domain, 8, 90) for domain in ("recipes", "logs", "poems", "ledgers")}
    for name in ("all", "less"):
        loaded = connito.load_expert(model, tmp_path / name)
        losses.append({domain: loss(model, table) for domain, table in held.items()})
        loaded.remove()
    rises = {domain: losses[1][domain] - losses[0][domain] for domain in held}
    assert rises["poems"] > 0.01
    assert all(rise < rises["poems"] / 5 for domain, rise in rises.items() if domain != "poems")


def test_by_example_a_long_shelf_is_first_cut_down_by_signatures(
    monkeypatch: pytest.MonkeyPatch, run: Any, stocked: Any, tiny: Path, texts: Any
) -> None:
    shelf, ids = stocked
    monkeypatch.setattr(example, "CONSIDERED", 2)
    found = run("search", "--like", texts["recipes"], "--base", tiny, "--shelf", shelf)["experts"]
    assert len(found) == 2
    assert Shelf(shelf).get(ids["recipes"])


def test_what_is_not_there_is_said_without_a_traceback(run: Any, stocked: Any, tmp_path: Path, texts: Any) -> None:
    _, ids = stocked
    with pytest.raises(NotFound, match="there is no folder"):
        run("skip", "--base", tmp_path / "nowhere", "--data", texts["recipes"])
    with pytest.raises(NotFound, match="no shelf"):
        run("export", ids["logs"], "--out", tmp_path / "x", "--shelf", tmp_path / "nowhere")


def test_what_the_platform_says_now_outweighs_the_shelfs_copy(
    monkeypatch: pytest.MonkeyPatch, run: Any, stocked: Any, tmp_path: Path
) -> None:
    shelf, ids = stocked
    said = Hit(ids["logs"], "logs", "CC0-1.0", 0.5, 1.0, Standing("deprecated", "a better one is there"), {})
    client = Client()
    monkeypatch.setattr(client.library, "search", lambda text, **_: [said])
    monkeypatch.setattr(Holdings, "platform", lambda self: client)
    monkeypatch.setenv("CONNITO_SHELF", str(shelf))
    (found,) = run("search", "--domain", "logs")["experts"]
    assert (found["expert_id"], found["status"]) == (ids["logs"], "deprecated")
