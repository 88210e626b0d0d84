"""Everything that runs a model runs it on the device that is set, and nothing it makes stays behind on another."""

from __future__ import annotations

import ast
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.base.loading import load_full
from connito.base.tiny import tiny_texts
from connito.cli.app import app
from connito.experts import flex
from connito.experts.choose import choose
from connito.experts.compose import Part, base_rows, rows_of
from connito.experts.extraction import extract_domain
from connito.experts.lowrank import low_rank, sparsify
from connito.experts.measure import BaselineLosses
from connito.experts.predict import predict_savings
from connito.experts.prune import masked, progressive, prune
from connito.experts.routing import Routing, variants_of
from connito.experts.token_skipping import skip_thresholds, skipping
from connito.moe.background import background
from connito.moe.device import NoDevice, device_of, devices_of
from connito.moe.diagnostics import measure
from connito.moe.evaluate import Evaluator
from connito.moe.layout import require_moe_layers
from connito.moe.resident import compress, read_targets
from connito.moe.rows import read_rows
from connito.moe.selection import select_experts
from connito.moe.statistics import collect
from connito.moe.training import train_local
from typer.testing import CliRunner

from tests.outside.test_routing_laws import CASES, model_of
from tests.support.families import logits
from tests.support.models import one_thread, tiny
from tests.support.second_device import SecondDevice, second_device

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

__all__ = ["one_thread", "tiny"]
ROOT = Path(__file__).parents[2]
TEXT = np.random.default_rng(0).integers(3, 60, (4, 13)).astype("int32")
FAMILIES = ["mixtral", "deepseek_v3", "gpt_oss", "minimax_m2", "qwen2_moe", "granitemoehybrid", "zaya"]
# Where a model is loaded only to be compared bit for bit, rewritten, or made from a recipe that has one result everywhere.
ON_THE_CPU = {
    "shared/connito/audit/remeasure.py",
    "shared/connito/base/folders.py",
    "shared/connito/base/recipes.py",
    "shared/connito/curation/exchange.py",
    "shared/connito/experts/export.py",
}


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Any:
    with second_device(monkeypatch) as mode:
        yield mode


def there(family: str) -> Any:
    return copy.deepcopy(model_of(family)).to(device_of())


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_training_and_judging_stay_on_the_device(other: SecondDevice, family: str) -> None:
    model = there(family)
    assert next(model.parameters()).device.type == "cuda"
    served: dict[int, Any] = {}
    statistics = collect(model, TEXT[:, :-1], served=served)
    chosen = select_experts(statistics, "esft-token", 0.3, helpers_per_layer=1)
    assert measure(model, chosen.layers, TEXT, budget=2)["causal_effect"]
    rows = read_rows(model, chosen)
    assert {tensor.device.type for tensor in rows.values()} == {"cpu"}
    usage = {index: layer.token_score for index, layer in statistics.layers.items()}
    rest = background(model, chosen, chosen.helpers, usage)
    evaluator = Evaluator(model, chosen)
    before, _ = evaluator.losses(rows, TEXT)
    for mode in ("natural", "masked", "restricted"):
        worker = compress(there(family), chosen, chosen.helpers, mode, background=rest if mode == "natural" else None)
        state, _ = train_local(worker, TEXT[None], learning_rate=0.01)
        assert {tensor.device.type for tensor in (*state.values(), *read_targets(worker).values())} == {"cpu"}
        after, _ = evaluator.losses(state, TEXT)
        assert not np.array_equal(before, after)
    assert other.calls > 1000


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_experts_out_stays_on_the_device(other: SecondDevice, family: str) -> None:
    model = there(family)
    before = BaselineLosses.of(model, {"text": TEXT})
    keep = choose(model, TEXT, "naee", max_experts=4 * len(require_moe_layers(model)))
    assert choose(model, TEXT, "router-weighted", max_experts=4 * len(keep))
    assert extract_domain(model, TEXT, TEXT, margin=10.0).kept
    with masked(model, keep):
        assert before.compare(model)
    betas = skip_thresholds(model, TEXT[:, :-1])
    with skipping(model, betas):
        assert before.compare(model)
    assert progressive(there(family), TEXT, 2)[0]
    if family != "gpt_oss":  # whose maps are transposed
        assert sparsify(there(family), TEXT[:, :-1], 0.5)
    factors, _ = low_rank(there(family), TEXT[:, :-1], 0.5)
    assert {tensor.device.type for tensor in factors.values()} == {"cpu"}
    assert before.compare(prune(model, keep))
    assert other.calls > 1000


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_growing_composing_and_routing_stay_on_the_device(other: SecondDevice, family: str) -> None:
    model = there(family)
    addition = flex.grow(model, "new", TEXT[None], TEXT[:, :-1], learning_rate=1e-3)
    assert {row.device.type for rows in addition.rows.values() for row in rows.values()} == {"cpu"}
    grown = there(family)
    flex.opt_in(grown, [addition])
    assert BaselineLosses.of(grown, {"text": TEXT})
    layers = {max(require_moe_layers(model)): [0, 2]}
    state = {name: rows + 0.01 for name, rows in read_rows(model, layers).items()}
    parts = [
        Part("one", "d" * 64, rows_of(layers, state)),
        Part("two", "e" * 64, rows_of(layers, {name: rows - 0.02 for name, rows in state.items()})),
    ]
    base = base_rows(model, parts)
    assert set(predict_savings(model, parts, TEXT)) == {"one", "two"}
    for method in ("arrow", "uniform", "molora"):
        routing = Routing.make(method, model, parts, base, text=TEXT, steps=2)
        with variants_of(model, parts, base, routing):
            assert BaselineLosses.of(model, {"text": TEXT})
    assert other.calls > 1000


@pytest.mark.parametrize("case", CASES)
def test_grouped_products_of_a_full_model_are_its_loop_to_rounding(case: str) -> None:
    grouped = copy.deepcopy(model_of(case))
    grouped.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(logits(grouped), logits(model_of(case)), rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize(("capability", "kernel"), [((7, 0), "eager"), ((8, 0), "grouped_mm")])
def test_a_loaded_model_runs_grouped_products_where_they_are_one_kernel(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kernel: str
) -> None:
    assert load_full(tiny).config._experts_implementation == "eager"  # type: ignore[union-attr]
    with second_device(monkeypatch, capability) as other:
        model: Any = load_full(tiny, device=device_of())
        assert {part.device.type for part in (*model.parameters(), *model.buffers())} == {"cuda"}
        assert model.config._experts_implementation == kernel
    assert other.calls > 10


COMMANDS = {
    "skip": ["library", "skip", "--base", "BASE", "--data", "TEXT"],
    "prune": ["library", "prune", "--base", "BASE", "--data", "TEXT", "--out", "OUT", "--max-experts", "8"],
    "extract": ["library", "extract", "--base", "BASE", "--data", "TEXT", "--out", "OUT", "--per-layer", "4", "--accept-loss"],
    "select": ["select", "--base", "BASE", "--data", "TEXT", "--diagnostics", "--effects", "2"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_the_same_from_another_device(
    name: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(tiny_texts("recipes", 77, 16)))
    places = {"BASE": str(tiny), "TEXT": str(text)}

    def run(out: str) -> Any:
        words = [{**places, "OUT": str(tmp_path / out)}.get(word, word) for word in COMMANDS[name]]
        result = CliRunner().invoke(app, [*words, "--json"])
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        document.pop("files", None)  # the card and the record name the time
        return {key: value for key, value in document.items() if "created" not in key}

    monkeypatch.setenv("CONNITO_DEVICE", "cpu")
    here = run("here")
    with second_device(monkeypatch) as other:
        there = run("there")
    assert other.calls > 100
    assert json.dumps(there).replace(str(tmp_path / "there"), "") == json.dumps(here).replace(
        str(tmp_path / "here"), ""
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_refuses_a_device_that_is_not_there_before_anything_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONNITO_DEVICE", "cpu")
    result = CliRunner().invoke(app, [*COMMANDS[name], "--device", "cuda:99"])
    assert isinstance(result.exception, NoDevice)
    assert result.exception.exit_code == 3
    assert not (tmp_path / "OUT").exists()


def test_the_second_device_notices_what_a_real_one_would(other: SecondDevice) -> None:
    away, here = torch.ones(3, device="cuda"), torch.ones(3)
    with pytest.raises(RuntimeError, match="cuda:0 and on the cpu"):
        away + here
    with pytest.raises(RuntimeError, match="cuda:0 and on the cpu"):
        torch.nn.Linear(3, 3).to(device_of())(here)
    with pytest.raises(TypeError, match="numpy"):
        away.numpy()
    assert (away + here.to(away.device)).cpu().numpy().sum() == 6


def test_the_device_is_what_is_said_or_the_variable_or_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONNITO_DEVICE", raising=False)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    assert device_of().type == best
    assert device_of("auto").type == best
    monkeypatch.setenv("CONNITO_DEVICE", "meta")
    assert device_of().type == "meta"
    assert device_of("cpu").type == "cpu"
    assert [str(device) for device in devices_of("cpu, meta")] == ["cpu", "meta"]


@pytest.mark.parametrize("name", ["cuda:99", "warp", "cpu,warp", "cuda:x", "1"])
def test_a_device_that_is_not_there_is_refused_with_what_there_is(name: str) -> None:
    with pytest.raises(
        NoDevice, match=r"there is no device .*: this machine has the CPU and \d+ CUDA devices?; use cpu"
    ):
        devices_of(name)


def test_no_model_is_loaded_without_saying_where() -> None:
    """Every call of a loader in the product names a device, but for those that compare bits or rewrite files."""
    silent, seen = set(), 0
    for path in sorted([*ROOT.glob("shared/connito/**/*.py"), *ROOT.glob("services/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "load_full":
                seen += 1
                if "device" not in {keyword.arg for keyword in node.keywords}:
                    silent.add(path.relative_to(ROOT).as_posix())
    assert seen > 15
    assert silent <= ON_THE_CPU
