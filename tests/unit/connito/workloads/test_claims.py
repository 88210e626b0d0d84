"""A claim as a miner makes it, and as somebody with the base counts it again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from connito.audit import remeasure
from connito.base.loading import load_full, load_resident_local
from connito.data.tensors import read_header
from connito.moe.evaluate import Evaluator
from connito.moe.prefix import Beginnings
from connito.moe.resident import compress
from connito.moe.state import load_state, save_state
from connito.protocol.claims import claim_of, drawn_claims
from connito.protocol.coding import encode
from connito.protocol.findings import PROTOCOL_VERSION
from connito.protocol.sequences import miner_batches
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.workloads.claims import Recount, Text

from services.trainer.training import claim_for
from tests.support.run import Run
from tests.unit.connito.workloads.conftest import Inputs

MINERS = tuple(f"U{letter * 55}" for letter in "ABCDEFGH")
SELECTED = {1: [3, 0]}


@pytest.fixture
def told(inputs: Inputs) -> Run:
    """A run in which cycle 1 is trained by eight miners, and drawn."""
    spec = run_pb2.RunSpec()
    spec.CopyFrom(inputs.spec)
    spec.protocol_version = PROTOCOL_VERSION
    spec.training.local_steps, spec.training.batch_sequences = 2, 2
    spec.merging.MergeFrom(run_pb2.MergePolicy(weighting="tokens", checked_claims=0.5))
    run = Run(name="run-1").created(spec).miners(*MINERS).validators("V")
    return run.opened("train", expected=[*MINERS, "V"]).opened("validate").drawn("V", seed=b"seed")


@pytest.fixture
def scene(told: Run, inputs: Inputs, tmp_path: Path) -> tuple[Recount, Path, Callable[[str], dict[str, str]]]:
    """Who recounts, θ_t, and the claim of a miner as the trainer makes it."""
    layers = [run_pb2.LayerSelection(layer=layer, experts=experts) for layer, experts in SELECTED.items()]
    told.selected(layers=layers)
    facts, text = told.facts, Text(told.facts.require_spec(), inputs.probe, None)
    evaluator = Evaluator(load_full(inputs.files), SELECTED)
    theta = tmp_path / "theta"
    save_state(evaluator.base, theta)
    model = compress(load_full(inputs.files), SELECTED, {1: [1, 2]})

    def made(miner: str) -> dict[str, str]:
        return claim_for(
            facts, model, miner_batches(facts, 1, miner, text.train), Beginnings(model, bf16=False), bf16=False
        )

    return Recount(evaluator, text, facts, 1, frozenset(MINERS)), theta, made


def entry(miner: str) -> cycle_pb2.Submission:
    return cycle_pb2.Submission(miner=miner, origin_cycle=1)


def hand_in(folder: Path, theta: Path, claim: dict[str, str]) -> Path:
    save_state(load_state(theta), folder / "artifact", claim)
    return folder / "artifact"


def test_honest_claims_hold_and_are_not_all_the_same(scene: Any, tmp_path: Path) -> None:
    recount, theta, made = scene
    claims = [made(miner) for miner in MINERS[:3]]
    for miner, claim in zip(MINERS, claims, strict=False):
        assert recount.falsehood(entry(miner), hand_in(tmp_path, theta, claim), theta) is None
    assert len({claim["routed"] for claim in claims}) > 1


def test_a_miner_that_holds_weights_in_bfloat16_claims_what_others_count(
    told: Run, inputs: Inputs, scene: Any, tmp_path: Path
) -> None:
    recount, theta, _ = scene
    facts, text = told.facts, Text(told.facts.require_spec(), inputs.probe, None)
    model = load_resident_local(inputs.files, SELECTED, {1: [1, 2]}, half=True)
    assert any(weight.dtype == torch.bfloat16 for weight in model.parameters())
    beginnings = Beginnings(model, bf16=True)
    for miner in MINERS:
        claim = claim_for(facts, model, miner_batches(facts, 1, miner, text.train), beginnings, bf16=True)
        assert recount.falsehood(entry(miner), hand_in(tmp_path, theta, claim), theta) is None


@pytest.mark.parametrize("codec", ["rows", "int8"])
@pytest.mark.parametrize("lie", [[60, 60], [0, 0]], ids=["inflated", "deflated"])
def test_a_lie_is_found_with_its_numbers(scene: Any, told: Run, tmp_path: Path, lie: list[int], codec: str) -> None:
    recount, theta, made = scene
    truth = json.loads(made(MINERS[0])["routed"])["1"]
    artifact = hand_in(tmp_path, theta, {"routed": json.dumps({"1": lie})})
    policy = told.facts.require_spec().training
    policy.codec = codec
    if codec != "rows":
        encode(artifact, theta, policy, None, tmp_path / "coded", tmp_path / "left")
        artifact = tmp_path / "coded"
    found = recount.falsehood(entry(MINERS[0]), artifact, theta)
    assert found is not None
    assert found.reason == reasons_pb2.REASON_FALSE_CLAIM
    pairs = set(zip(lie, truth, strict=True))
    assert (found.finding.count, found.finding.limit) in pairs


def test_another_miners_claim_is_a_lie_where_their_text_differs(scene: Any, tmp_path: Path) -> None:
    recount, theta, made = scene
    claims = {miner: json.loads(made(miner)["routed"])["1"] for miner in MINERS}
    far = max(MINERS, key=lambda m: sum(abs(a - b) for a, b in zip(claims[m], claims[MINERS[0]], strict=True)))
    apart = sum(abs(a - b) for a, b in zip(claims[far], claims[MINERS[0]], strict=True))
    artifact = hand_in(tmp_path, theta, made(far))
    found = recount.falsehood(entry(MINERS[0]), artifact, theta)
    assert (found is not None) == (apart > 0.1 * 64)


def test_nothing_is_said_of_those_who_were_not_drawn_or_claim_nothing(scene: Any, tmp_path: Path) -> None:
    recount, theta, _ = scene
    assert recount.falsehood(entry(MINERS[0]), hand_in(tmp_path, theta, {}), theta) is None
    lie = hand_in(tmp_path, theta, {"routed": '{"1":[60,60]}'})
    assert claim_of(read_header(lie), recount._facts.require_spec(), recount._facts.require_selection()) is not None
    assert recount.falsehood(entry("somebody else"), lie, theta) is None


def test_the_seed_draws_the_share_that_the_policy_says(told: Run) -> None:
    facts = told.facts
    drawn = drawn_claims(facts, 1, MINERS)
    assert len(drawn) == 4
    assert drawn == drawn_claims(facts, 1, reversed(MINERS))
    policy = facts.require_spec().merging
    policy.checked_claims = 0.01
    assert len(drawn_claims(facts, 1, MINERS)) == 1
    policy.checked_claims = 0.0
    assert drawn_claims(facts, 1, MINERS) == frozenset()
    policy.checked_claims, policy.weighting = 1.0, "capped"
    assert drawn_claims(facts, 1, MINERS) == frozenset()


def _audited(told: Run, recount: Recount, files: dict[str, Path], theta: Path, said: dict[str, Any]) -> Any:
    """The audit's step over submissions by miner, of which validator V reported these reasons."""
    from connito.store import ref_of_file
    from connito.v1 import artifacts_pb2

    refs = {miner: ref_of_file(path, "", artifacts_pb2.REALM_SUBMISSION) for miner, path in files.items()}
    start = ref_of_file(theta, "", artifacts_pb2.REALM_PUBLIC)
    told.drop("train", 1, "opened").opened("train", expected=[*MINERS, "V"], state=start)
    entries = [cycle_pb2.Submission(miner=miner, artifact=refs[miner], origin_cycle=1) for miner in files]
    told.opened("submit").closed("submit").settled("submit", submissions=entries)
    told.reported("V", scores=[cycle_pb2.SubmissionScore(miner=m, reason=reason) for m, reason in said.items()])
    paths = {start.digest: theta, **{refs[miner].digest: path for miner, path in files.items()}}
    artifacts = SimpleNamespace(paths=paths, path=lambda ref: paths[ref.digest])
    evidence = SimpleNamespace(facts=told.facts, name=lambda m: m[:3], subject=lambda *of: ".".join(map(str, of)))
    work: Any = SimpleNamespace(evidence=evidence, artifacts=artifacts, say=lambda _: None)
    models: Any = SimpleNamespace(recount=lambda facts, cycle, miners: Recount(
        recount._evaluator, recount._text, facts, cycle, miners))  # fmt: skip
    return remeasure.claims(work, models, 1)


def test_an_audit_counts_all_claims_and_knows_who_was_to_look(scene: Any, told: Run, tmp_path: Path) -> None:
    recount, theta, made = scene
    drawn = drawn_claims(told.facts, 1, MINERS)
    seen, accused = sorted(drawn)[:2]
    unseen = min(set(MINERS) - drawn)
    lie = {"routed": '{"1":[60,60]}'}
    files = {}
    for miner in MINERS:
        folder = tmp_path / miner
        folder.mkdir()
        files[miner] = hand_in(folder, theta, lie if miner in (seen, unseen) else made(miner))
    step = _audited(told, recount, files, theta, {seen: 0, accused: reasons_pb2.REASON_FALSE_CLAIM})
    assert step.compared == len(MINERS)
    assert {one.miner: one.what.split(":")[0] for one in step.differences} == {
        seen: "lets pass that its claim is false",
        accused: "calls a claim false that is true",
    }
    assert step.note.startswith(f"false, and not drawn: {unseen[:3]}: its claim is false: of layers.1")


def test_an_audit_of_honest_claims_finds_nothing(scene: Any, told: Run, tmp_path: Path) -> None:
    recount, theta, made = scene
    files = {}
    for miner in MINERS:
        (tmp_path / miner).mkdir()
        files[miner] = hand_in(tmp_path / miner, theta, made(miner))
    step = _audited(told, recount, files, theta, dict.fromkeys(MINERS, 0))
    assert (step.differences, step.note) == ((), "")
