from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from connito.errors import Invalid
from connito.moe.rows import base_digests, read_rows
from connito.moe.state import load_state
from connito.v1 import artifacts_pb2, reasons_pb2, run_pb2
from connito.workloads.fetching import BaseFiles
from connito.workloads.selecting import Chosen, Probes, choose

from services.selector.actions import _compute
from services.selector.handlers import failed, made
from tests.support.second_device import second_device
from tests.unit.connito.workloads.conftest import Inputs


def run(inputs: Inputs, theta: Path, **policy: float | str) -> Chosen:
    spec = run_pb2.RunSpec()
    spec.CopyFrom(inputs.spec)
    for name, value in policy.items():
        setattr(spec.selection, name, value)
    chosen = choose(spec, inputs.manifest, inputs.files, Probes(inputs.probe, inputs.replay), theta)
    assert chosen is not None
    return chosen


def test_targets_helpers_and_theta_fit_the_base(inputs: Inputs, tmp_path: Path) -> None:
    from connito.base.loading import load_full

    chosen = run(inputs, tmp_path / "theta")

    assert set(chosen.selection.layers) == {1, 2}
    for layer in chosen.layers():
        assert 0 < len(layer.experts) < 8
        assert len(layer.helpers) == 2
        assert not set(layer.experts) & set(layer.helpers)
    model = load_full(inputs.files)
    theta, rows = load_state(tmp_path / "theta"), read_rows(model, chosen.selection)
    assert theta.keys() == rows.keys()
    assert all(theta[name].equal(rows[name]) for name in rows)
    assert chosen.target_parameters == sum(tensor.numel() for tensor in rows.values())
    assert chosen.model_parameters == sum(parameter.numel() for parameter in model.parameters())
    digests = base_digests(model, chosen.selection.layers)
    assert chosen.base == {"rest": digests.rest, "rows": digests.rows}


def test_the_same_run_gives_the_same_bytes(inputs: Inputs, tmp_path: Path) -> None:
    one, two = run(inputs, tmp_path / "one"), run(inputs, tmp_path / "two")

    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert one.statistics == two.statistics
    assert one.report("s") == two.report("s")


def test_a_selection_on_another_device_is_the_same(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run(inputs, tmp_path / "here", causal_effects=2, background=True)
    with second_device(monkeypatch) as other:
        there = run(inputs, tmp_path / "there", causal_effects=2, background=True)
    assert other.calls > 100
    assert there == here
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()


def test_the_report_is_what_the_command_line_prints(inputs: Inputs, tmp_path: Path) -> None:
    report = json.loads(run(inputs, tmp_path / "theta").report("digest"))

    assert report["method"] == "esft-token"
    assert report["threshold"] == 0.4
    assert set(report["layers"]) == {"1", "2"}
    assert all(len(scores) == 8 for scores in report["scores"].values())
    assert report["selected"] == sum(map(len, report["layers"].values()))
    assert report["total"] == 16
    assert report["statistics"] == "digest"
    assert set(report["diagnostics"]["mass_by_domain"]) == {"letters", "digits"}


def test_caps_hold(inputs: Inputs, tmp_path: Path) -> None:
    assert run(inputs, tmp_path / "theta", max_experts=3).selection.selected == 3
    size = inputs.manifest.expert_bytes()[1]
    assert run(inputs, tmp_path / "theta", max_bytes=2 * size).selection.selected == 2


def test_differential_needs_general_text(inputs: Inputs, tmp_path: Path) -> None:
    assert run(inputs, tmp_path / "theta", method="differential", threshold=0.5).selection.selected > 0

    spec = run_pb2.RunSpec()
    spec.CopyFrom(inputs.spec)
    spec.selection.method = "differential"
    with pytest.raises(Invalid, match="add a replay corpus") as caught:
        choose(spec, inputs.manifest, inputs.files, Probes(inputs.probe), tmp_path / "theta")
    assert failed("run-1", caught.value).reason == reasons_pb2.REASON_BAD_SPEC


@pytest.mark.parametrize(("name", "value"), [("method", "guess"), ("threshold", 1.5), ("max_bytes", 1)])
def test_a_policy_that_cannot_be_ends_the_run_with_a_reason(
    inputs: Inputs, tmp_path: Path, name: str, value: float | str
) -> None:
    with pytest.raises(Invalid) as caught:
        run(inputs, tmp_path / "theta", **{name: value})

    failure = failed("run-1", caught.value)
    assert failure.reason == reasons_pb2.REASON_SELECTION_FAILED
    assert failure.detail == str(caught.value)


def test_a_probe_of_another_tokenizer_is_a_verdict_not_a_crash(inputs: Inputs, tmp_path: Path) -> None:
    from connito.data.corpus import Corpus

    Corpus.from_documents([[5000] * 100], {"separator": "256"}).save(tmp_path / "alien")

    with pytest.raises(Invalid, match="tokenised with this base's tokenizer"):
        _compute(inputs.spec, BaseFiles(inputs.manifest, inputs.files), Probes(tmp_path / "alien"), tmp_path / "theta")


def test_the_fact_carries_the_map(inputs: Inputs, tmp_path: Path) -> None:
    chosen = run(inputs, tmp_path / "theta")
    report, theta = artifacts_pb2.ArtifactRef(digest="r"), artifacts_pb2.ArtifactRef(digest="t")

    fact = made("run-1", chosen, report, theta)

    assert {layer.layer: list(layer.experts) for layer in fact.layers} == chosen.selection.layers
    assert (fact.selected_experts, fact.total_experts) == (chosen.selection.selected, 16)
    assert (fact.report, fact.initial_state) == (report, theta)


def test_the_signature_is_the_mean_hidden_state_of_what_the_experts_serve(inputs: Inputs, tmp_path: Path) -> None:
    import torch
    from connito.base.loading import load_full
    from connito.data.corpus import Corpus
    from connito.data.packing import pack
    from connito.experts.tape import each_layer
    from connito.library.signature import decode_signature

    chosen = run(inputs, tmp_path / "theta")
    vectors = decode_signature(chosen.signature)
    model = load_full(inputs.files)
    rows = pack(Corpus.load(inputs.probe), inputs.spec.training.sequence_length)[:, :-1]
    seen = []
    for row in rows:
        text = row[row["position"] >= 0]
        for piece in np.split(text["token"], np.flatnonzero(text["position"] == 0)[1:]):
            seen.append(each_layer(model, piece[None], lambda tape: (tape.inputs, tape.ids), max_tokens=piece.size))
    for index, experts in chosen.selection.layers.items():
        states, ids = (torch.cat([each[index][part] for each in seen]) for part in (0, 1))
        slots = torch.isin(ids, torch.tensor(experts)).sum(dim=1).double()
        expected = (states.double() * slots[:, None]).sum(dim=0) / slots.sum()
        torch.testing.assert_close(torch.tensor(vectors[index]).double(), expected, rtol=1e-4, atol=1e-5)
        assert chosen.signature["tokens"][str(index)] == int(slots.sum())


def test_several_domains_are_selected_together_and_their_overlap_is_reported(inputs: Inputs, tmp_path: Path) -> None:
    spec = run_pb2.RunSpec()
    spec.CopyFrom(inputs.spec)
    spec.selection.contested = "exclusive"
    probes = Probes(inputs.probe, beside={"digits": inputs.replay})
    chosen = choose(spec, inputs.manifest, inputs.files, probes, tmp_path / "theta")
    report = json.loads(chosen.report("s"))

    assert report["domains"].keys() == {"letters", "digits"}
    assert report["shared"] == {}
    assert report["diagnostics"]["contested"] == "exclusive"
    assert set(report["diagnostics"]["overlap"]) == {"letters|digits"}
    assert len(report["probes"]) == 2
    both = {layer: set(experts) for layer, experts in chosen.selection.layers.items()}
    parts = chosen.selection.domains
    assert both == {layer: set(parts["letters"][layer]) | set(parts["digits"][layer]) for layer in both}


def test_the_report_says_what_removing_an_expert_costs_within_the_budget(inputs: Inputs, tmp_path: Path) -> None:
    report = json.loads(run(inputs, tmp_path / "theta", causal_effects=3).report("s"))

    effects = report["diagnostics"]["causal_effect"]
    assert sum(map(len, effects.values())) == 3
    assert report["diagnostics"]["top1_perplexity_ratio"] > 0
    assert all(int(e) in report["layers"][i] for i, found in effects.items() for e in found)


def test_memory_caps_hold(inputs: Inputs, tmp_path: Path) -> None:
    from connito.moe.budget import of_base

    sizes = inputs.manifest.expert_bytes()
    costs, resident = of_base(
        sizes, inputs.manifest.size, inputs.manifest.experts(), value_bytes=4, helpers_per_layer=2
    )
    room = resident + 3 * costs[1].training
    assert run(inputs, tmp_path / "theta", max_vram=room).selection.selected == 3
    assert run(inputs, tmp_path / "theta", max_experts=1, scope="layer").selection.selected == 2
