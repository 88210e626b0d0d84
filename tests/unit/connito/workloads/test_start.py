"""Starting from the shelf: an expert that helps is taken, by measurement; one that does not, or may not be, is not."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from connito.errors import Invalid
from connito.library.artifact import ExpertHeader, write_expert
from connito.library.start import Shelved, deposits, notice_of, notices, refusal
from connito.moe.rows import read_rows
from connito.moe.state import load_state, save_state
from connito.v1 import reasons_pb2, run_pb2
from connito.wire.fact import Fact
from connito.workloads.selecting import Chosen, Library, Probes, choose

from tests.unit.connito.workloads.conftest import Inputs

LAYERS = {1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [0, 2, 4, 6]}


@pytest.fixture(scope="session")
def shelf(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> list[Shelved]:
    """Two experts of the base: one trained on the probe's language, one that is noise."""
    from connito.base.loading import load_full
    from connito.moe.resident import compress
    from connito.moe.training import train_local

    folder = tmp_path_factory.mktemp("shelf")
    rng = np.random.default_rng(1)
    text = rng.integers(97, 123, 64 * 4 * 17).astype(np.int32).reshape(64, 4, 17)
    others = {layer: [e for e in range(8) if e not in experts] for layer, experts in LAYERS.items()}
    trained, _ = train_local(compress(load_full(inputs.files), LAYERS, others), text, learning_rate=3e-3)
    base = read_rows(load_full(inputs.files), LAYERS)
    generator = torch.Generator().manual_seed(0)
    noise = {name: row + 0.5 * torch.randn(row.shape, generator=generator) for name, row in base.items()}
    return [shelved(folder, "letters", trained), shelved(folder, "noise", noise)]


def shelved(folder: Path, domain: str, state: dict[str, torch.Tensor], **record: Any) -> Shelved:
    save_state(state, folder / f"{domain}.state", {"base": "b" * 64})
    header = ExpertHeader(domain, "random", "b" * 64, LAYERS, f"run-{domain}", 1)
    digest = write_expert(folder / f"{domain}.state", folder / f"{domain}.expert", header)
    deposit = run_pb2.ExpertDeposited(run=f"run-{domain}", expert_id=f"{domain}-1", domain=domain, base_digest="b" * 64)
    deposit.expert.digest = digest
    return Shelved(deposit, {"license": "Apache-2.0", **record}, folder / f"{domain}.expert")


def start(
    inputs: Inputs, theta: Path, shelf: list[Shelved], start_from: str = "auto", licence: str = "Apache-2.0"
) -> Chosen:
    spec = run_pb2.RunSpec()
    spec.CopyFrom(inputs.spec)
    spec.start_from, spec.license = start_from, licence
    chosen = choose(spec, inputs.manifest, inputs.files, Probes(inputs.probe, inputs.replay), theta, Library(shelf, 9))
    assert chosen is not None
    return chosen


def choice_of(chosen: Chosen) -> run_pb2.StartChoice:
    assert chosen.start is not None
    return chosen.start


def test_the_expert_that_saves_most_on_the_probe_is_the_start(
    inputs: Inputs, shelf: list[Shelved], tmp_path: Path
) -> None:
    from connito.base.loading import load_full

    chosen = start(inputs, tmp_path / "theta", shelf)

    choice = choice_of(chosen)
    assert choice.expert_id == "letters-1"
    assert choice.library_sequence == 9
    best, worst = choice.candidates
    assert best.expert_id == "letters-1"
    assert best.measured
    assert 0 < best.low < best.saved < best.high
    assert worst.saved < best.saved
    theta, base = load_state(tmp_path / "theta"), read_rows(load_full(inputs.files), chosen.selection)
    expert = load_state(shelf[0].path)
    shared = 0
    for name, rows in theta.items():
        layer = int(name.split(".")[1])
        for place, number in enumerate(sorted(chosen.selection.layers[layer])):
            if number in LAYERS[layer]:
                assert rows[place].equal(expert[name][LAYERS[layer].index(number)])
                shared += 1
            else:
                assert rows[place].equal(base[name][place])
    assert 0 < choice.shared_rows <= shared
    # The digests in the report stay those of the base: that is what an expert replaces.
    assert chosen.base == start(inputs, tmp_path / "none", shelf[1:]).base


def test_an_expert_that_does_not_help_is_not_taken(inputs: Inputs, shelf: list[Shelved], tmp_path: Path) -> None:
    from connito.base.loading import load_full

    chosen = start(inputs, tmp_path / "theta", shelf[1:])

    assert choice_of(chosen).expert_id == ""
    assert "from the base" in choice_of(chosen).detail
    assert not choice_of(chosen).candidates[0].low > 0
    theta, base = load_state(tmp_path / "theta"), read_rows(load_full(inputs.files), chosen.selection)
    assert all(theta[name].equal(base[name]) for name in base)


def test_a_named_expert_is_taken_whatever_it_measures_and_the_log_says_what(
    inputs: Inputs, shelf: list[Shelved], tmp_path: Path
) -> None:
    chosen = start(inputs, tmp_path / "theta", shelf[1:], "noise-1")

    assert choice_of(chosen).expert_id == "noise-1"
    assert choice_of(chosen).candidates[0].measured
    assert choice_of(chosen).candidates[0].saved < 0


def test_choosing_again_gives_the_same_bytes(inputs: Inputs, shelf: list[Shelved], tmp_path: Path) -> None:
    one, two = start(inputs, tmp_path / "one", shelf), start(inputs, tmp_path / "two", shelf)

    assert one.start == choice_of(two)
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("one", "two")}
    assert len(digests) == 1


def test_terms_rule_an_expert_out(inputs: Inputs, shelf: list[Shelved], tmp_path: Path) -> None:
    closed = Shelved(shelf[0].deposit, {"license": "CC-BY-ND-4.0"}, shelf[0].path)

    chosen = start(inputs, tmp_path / "theta", [closed, shelf[1]])

    assert choice_of(chosen).expert_id == ""
    assert {row.expert_id: row.refused for row in choice_of(chosen).candidates}["letters-1"].startswith("CC-BY-ND-4.0")
    with pytest.raises(Invalid, match="allows no derivatives") as caught:
        start(inputs, tmp_path / "named", [closed], "letters-1")
    assert caught.value.reason == reasons_pb2.REASON_START_IMPOSSIBLE


@pytest.mark.parametrize(
    ("record", "spec", "why"),
    [
        ({"license": "CC-BY-SA-4.0"}, {"license": "CC-BY-SA-4.0"}, ""),
        ({"license": "CC-BY-SA-4.0"}, {"license": "MIT"}, "demands"),
        ({"license": "CC-BY-NC-4.0"}, {"license": "MIT"}, "forbids commercial use"),
        ({"license": "CC-BY-NC-4.0"}, {"license": "CC-BY-NC-4.0"}, ""),
        ({"license": ""}, {"license": "MIT"}, "not known"),
        ({"license": "LicenseRef-ours"}, {"license": "LicenseRef-ours"}, ""),
        ({"license": "MIT", "governance": {"visibility": "private", "owner": "A"}}, {"customer": "B"}, "not be seen"),
        (
            {"license": "MIT", "governance": {"visibility": "private", "owner": "A"}},
            {"customer": "A", "license": "MIT"},
            "would be public",
        ),
    ],
)
def test_what_the_terms_of_an_expert_allow(
    record: dict[str, dict[str, str] | str], spec: dict[str, Any], why: str
) -> None:
    said = refusal(record, run_pb2.RunSpec(**spec))

    assert (why in said) if why else said == ""


def test_only_deposits_of_the_base_that_were_there_count(inputs: Inputs) -> None:
    from connito.wire.fact import Fact
    from connito.wire.subjects import FactKey

    def fact(sequence: int, name: str, base: str = "b" * 64) -> Fact:
        message = run_pb2.ExpertDeposited(run="r", expert_id=name, base_digest=base)
        key = FactKey("library", 0, "deposited", name)
        return Fact("r", key, message, "L", "LIBRARY", sequence, 0)

    log = [fact(3, "late"), fact(1, "first"), fact(2, "foreign", "c" * 64)]
    spec = run_pb2.RunSpec(start_from="auto")
    spec.base.manifest.digest = "b" * 64

    assert [row.expert_id for row in deposits(log, spec, 2)] == ["first"]
    assert [row.expert_id for row in deposits(log, spec, 3)] == ["first", "late"]
    spec.start_from = "foreign"
    with pytest.raises(Invalid, match="another base"):
        deposits(log, spec, 3)
    spec.start_from = "late"
    with pytest.raises(Invalid, match="no expert 'late'"):
        deposits(log, spec, 2)


def test_what_the_library_says_against_an_expert_counts_from_when_it_was_said(
    inputs: Inputs, shelf: list[Shelved], tmp_path: Path
) -> None:
    from connito.wire.fact import Fact
    from connito.wire.subjects import FactKey

    def notice(sequence: int, subject: str, kind: run_pb2.NoticeKind.ValueType) -> Fact:
        message = run_pb2.ExpertNotice(run="library", id=str(sequence), subject=subject, kind=kind, reason="asked")
        key = FactKey("library", 0, "notice", str(sequence))
        return Fact("library", key, message, "L", "LIBRARY", sequence, 0)

    log = [
        notice(1, "letters-1", run_pb2.NOTICE_KIND_YANKED),
        notice(3, "letters-1", run_pb2.NOTICE_KIND_RESTORED),
        notice(4, "diary", run_pb2.NOTICE_KIND_OPTED_OUT),
    ]

    assert notices(log, 2) == {"letters-1": "yanked: asked"}
    assert notices(log, 3) == {}
    assert "opted out" in notice_of({"governance": {"sources": ["diary"]}}, "letters-1", notices(log, 4))
    yanked = Shelved(shelf[0].deposit, shelf[0].record, shelf[0].path, "yanked: asked")
    chosen = start(inputs, tmp_path / "theta", [yanked, shelf[1]])
    assert choice_of(chosen).expert_id == ""
    assert {row.expert_id: row.refused for row in choice_of(chosen).candidates}["letters-1"] == "yanked: asked"


def test_an_expert_that_the_customer_may_not_see_leaves_no_trace(
    inputs: Inputs, shelf: list[Shelved], tmp_path: Path
) -> None:
    """What a run says of its start is read by every miner, and an artifact that is named can be fetched."""
    secret = {"license": "Apache-2.0", "governance": {"visibility": "private", "owner": "SOMEBODY"}}
    hidden = [Shelved(shelf[0].deposit, secret, shelf[0].path), shelf[1]]
    chosen = start(inputs, tmp_path / "theta", hidden)
    assert [row.expert_id for row in choice_of(chosen).candidates] == ["noise-1"]
    with pytest.raises(Invalid, match="there is no expert 'letters-1' in the library"):
        start(inputs, tmp_path / "theta", hidden[:1], start_from="letters-1")
