"""Selection from counts alone: the published sets, the caps, and every refusal with its remedy."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from connito.errors import Invalid, NotFound
from connito.moe.budget import Budget, Cost
from connito.moe.selection import Selection, choose_helpers, ema, select_experts
from connito.moe.statistics import RoutingStatistics, read_trace

PUBLISHED = Path(os.environ.get("CONNITO_TEST_DATA", Path(__file__).parents[5] / "shared" / "data")) / "esft-traces"


def statistics(*layers: list[list[int]], num_experts: int = 4) -> RoutingStatistics:
    """Statistics of tokens that chose these expert ids, with equal weights."""
    out = RoutingStatistics()
    for index, choices in enumerate(layers):
        ids = np.array(choices)
        out.add(index, num_experts, ids, np.full(ids.shape, 1 / ids.shape[1]))
    return out


@pytest.mark.data
@pytest.mark.parametrize("task", ["law", "translation"])
def test_the_published_sets_are_reproduced_in_every_layer_and_in_order(task: str) -> None:
    if not PUBLISHED.exists():
        pytest.skip(f"NOT CHECKED: the published routing traces are not at {PUBLISHED}; set CONNITO_TEST_DATA")
    chosen = select_experts(read_trace(PUBLISHED / f"{task}.npz", num_experts=64), "esft-token", 0.2)
    published = json.loads((PUBLISHED / f"{task}.selected.json").read_text())
    assert {str(layer): experts for layer, experts in chosen.layers.items()} == published


@pytest.mark.data
@pytest.mark.parametrize("task", ["law", "translation"])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.3])
def test_gate_scores_are_rounded_and_summed_as_published(task: str, p: float) -> None:
    if not PUBLISHED.exists():
        pytest.skip(f"NOT CHECKED: the published routing traces are not at {PUBLISHED}; set CONNITO_TEST_DATA")
    chosen = select_experts(read_trace(PUBLISHED / f"{task}.npz", num_experts=64), "esft-gate", p)
    unrounded = 0
    with np.load(PUBLISHED / f"{task}.npz") as trace:
        for layer, experts in chosen.layers.items():
            ids, weights = trace[f"layer_{layer}_ids"], trace[f"layer_{layer}_weights"].astype(float)
            sums = np.bincount(ids.ravel(), weights.ravel(), minlength=64) / len(ids)
            prefixes = []
            for scores in ([round(x, 4) for x in sums], list(sums)):
                ranked = sorted(range(64), key=lambda expert: -scores[expert])
                ends = next((n for n in range(65) if sum(scores[e] for e in ranked[:n]) >= p), 64)
                prefixes.append([expert for expert in ranked[:ends] if scores[expert] > 0])
            assert experts == prefixes[0]
            unrounded += prefixes[0] != prefixes[1]
    assert unrounded or p == 0.1, "rounding makes no difference here: the test shows nothing"


def test_the_prefix_ends_where_the_threshold_is_reached() -> None:
    # Scores 0.5, 0.25, 0.25, 0 of experts 1, 0, 2, 3; equal scores by id.
    counted = statistics([[1], [1], [0], [2]])
    assert select_experts(counted, "esft-token", 0.5).layers == {0: [1]}
    assert select_experts(counted, "esft-token", 0.51).layers == {0: [1, 0]}
    everything = select_experts(counted, "esft-token", 1.0)
    assert everything.layers == {0: [1, 0, 2]}, "p = 1 need not select experts that were never used"
    assert everything.mass == pytest.approx(1.0)


def test_gate_scores_are_means_over_all_tokens() -> None:
    out = RoutingStatistics()
    out.add(0, 3, np.array([[0, 1], [0, 2]]), np.array([[0.3, 0.1], [0.2, 0.1]]))
    chosen = select_experts(out, "esft-gate", 0.26)
    assert chosen.scores[0] == pytest.approx([0.25, 0.05, 0.05])
    assert chosen.layers == {0: [0, 1]}


def test_differential_leaves_out_what_general_text_uses_as_much() -> None:
    target = statistics([[0, 1], [0, 1], [0, 2], [0, 1]])
    general = statistics([[0, 3], [0, 3], [0, 2], [0, 3]])
    assert select_experts(target, "esft-token", 0.5).layers == {0: [0]}
    assert select_experts(target, "differential", 1.0, general={"general": general}).layers == {0: [1]}


def test_des_moe_takes_everything_near_the_best() -> None:
    target = statistics([[0], [0], [0], [1], [1], [2]])
    assert select_experts(target, "des-moe", 0.6).layers == {0: [0, 1]}
    assert ema(None, np.array([1.0])) == pytest.approx([1.0])
    assert ema(np.array([1.0]), np.array([0.0])) == pytest.approx([0.9])


def test_budgets_keep_the_best_scores_over_all_layers() -> None:
    costs = {0: Cost(100, 100), 1: Cost(150, 150)}
    target = statistics([[0], [0], [0], [1]], [[2], [2], [3], [1]])
    assert select_experts(target, "esft-token", 1.0, budget=Budget(2)).layers == {0: [0], 1: [2]}
    assert select_experts(target, "esft-token", 1.0, budget=Budget(1, scope="layer")).layers == {0: [0], 1: [2]}
    assert select_experts(target, "esft-token", 1.0, budget=Budget(size=250, costs=costs)).layers == {
        0: [0],
        1: [2],
    }
    assert select_experts(target, "esft-token", 1.0, budget=Budget(size=120, costs=costs)).layers == {0: [0]}


def test_helpers_are_the_most_used_experts_that_were_not_selected() -> None:
    target = statistics([[1], [1], [1], [0], [0], [2]])
    chosen = select_experts(target, "esft-token", 0.5, helpers_per_layer=2)
    assert chosen.layers == {0: [1]}
    assert chosen.helpers == {0: [0, 2]}
    assert choose_helpers(target, chosen.layers, 0) == {}


def test_json_has_the_published_surface_and_comes_back_whole() -> None:
    target, other = statistics([[0, 1], [0, 2]]), statistics([[2, 3], [2, 3]])
    chosen = select_experts(target, "esft-token", 0.6, general={"other": other}, helpers_per_layer=1, domain="law")
    shown = json.loads(chosen.to_bytes())
    assert shown["layers"] == {"0": [0, 1]}
    assert {"method", "threshold", "layers", "scores", "selected", "total", "mass"} <= shown.keys()
    assert (shown["selected"], shown["total"]) == (2, 4)
    assert Selection.from_json(shown) == chosen


def test_diagnostics_tell_domains_apart() -> None:
    target, other = statistics([[0, 1], [0, 2]]), statistics([[2, 3], [2, 3]])
    seen = select_experts(target, "esft-token", 0.5, general={"other": other}, domain="law").diagnostics
    assert seen["mass_by_domain"] == {"law": 0.5, "other": 0.0}
    # Expert 0 serves one domain only; expert 2 serves both, unevenly.
    entropy = seen["layers"]["0"]["domain_entropy"]
    assert entropy[0] == pytest.approx(0.0)
    assert 0.5 < entropy[2] < 1
    assert seen["layers"]["0"]["unused"] == [3]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "best"}, "unknown selection method"),
        ({"threshold": 0.0}, "above 0 and at most 1"),
        ({"threshold": 1.5}, "above 0 and at most 1"),
        ({"method": "differential"}, "--general"),
        ({"budget": Budget(size=10, costs={0: Cost(100, 100)})}, "too small for one expert"),
        ({"budget": Budget(size=10)}, "needs the size of an expert"),
        ({"general": {"g": statistics([[0]], num_experts=9)}}, "another model"),
    ],
)
def test_refusals_say_why_and_what_to_do(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(Invalid, match=says):
        select_experts(statistics([[0, 1]]), **arguments)  # type: ignore[arg-type]


def test_empty_and_dense_statistics_are_refused() -> None:
    with pytest.raises(Invalid, match="dense"):
        select_experts(RoutingStatistics())
    with pytest.raises(Invalid, match="probe is empty"):
        select_experts(statistics(np.zeros((0, 2), dtype=int)))  # type: ignore[arg-type]


def test_traces_are_read_and_broken_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    np.savez(path, layer_3_ids=np.array([[0, 5]], dtype=np.uint8), layer_3_weights=np.array([[0.7, 0.2]]))
    assert list(read_trace(path).layers) == [3]
    assert len(read_trace(path).layers[3].counts) == 6
    assert len(read_trace(path, num_experts=8).layers[3].counts) == 8
    with pytest.raises(Invalid, match="names expert 5"):
        read_trace(path, num_experts=4)
    with pytest.raises(NotFound):
        read_trace(tmp_path / "none.npz")
    np.savez(path, layer_3_ids=np.array([[0, 5]]))
    with pytest.raises(Invalid, match="layer_3_weights"):
        read_trace(path)
    path.write_bytes(b"no archive")
    with pytest.raises(Invalid, match=r"not an \.npz"):
        read_trace(path)
