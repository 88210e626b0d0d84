"""A cycle's merge over small states. The held-out loss is a function of the state: distance to a point."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.tensors import read_header, read_tensors
from connito.protocol.coding import decoded, encode
from connito.protocol.findings import Refusal
from connito.protocol.merging import opened
from connito.protocol.merging.cycle import Merged, merge_cycle
from connito.protocol.merging.earlier import EarlierWork
from connito.protocol.merging.gate import Losses
from connito.protocol.merging.opened import Files
from connito.protocol.scoring import copies
from connito.protocol.scoring.counted_reports import read_reports
from connito.protocol.scoring.verdicts import agree
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.sentences import detail_of
from connito.wire.locked import lock_file
from numpy.typing import NDArray

from tests.support.files import write_tensors
from tests.support.stage import Stage

NAME = "layers.0.down_proj"
START = np.zeros((2, 3), np.float32)
GOAL = np.full((2, 3), 1.0, np.float32)


def row(values: list[float]) -> NDArray[np.float32]:
    """Both rows of the state, three numbers away from the start."""
    return START + np.array(values, np.float32)


def load(path: Path) -> NDArray[np.float32]:
    return read_tensors(path, [NAME])[0][NAME]


def distance(part: str, digest: str, path: Path) -> Losses:
    """Target: squared distance to GOAL. General: how far the state is from the origin, beyond 4."""
    value = load(path)
    return Losses(
        {
            "medical": (float(np.square(value - GOAL).sum()), 1),
            "code": (max(0.0, float(np.square(value).sum()) - 4.0), 1),
        }
    )


class Desk:
    """Facts and files of one cycle."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage, self.folder = stage, folder
        stage.facts.require_spec().holdout.domain = "medical"
        self.parent = folder / "parent"
        write_tensors(self.parent, {NAME: START}, {"version": "0"})
        self.states: dict[str, Path] = {}
        self.momentum: Path | None = None
        self.earlier: list[EarlierWork] = []

    def submit(self, miner: str, value: NDArray[Any], utility: float) -> None:
        path = self.folder / f"{miner}.state"
        write_tensors(path, {NAME: np.asarray(value, np.float32)})
        self.states[miner] = path
        self.utilities = {**getattr(self, "utilities", {}), miner: utility}

    def merge(
        self,
        out: str = "out",
        submissions: list[cycle_pb2.Submission] | None = None,
        bases: dict[str, Path] | None = None,
        **merging: float | str,
    ) -> Merged:
        for validator in ("VA", "VB", "VC"):
            self.stage.add(validator, self.utilities)
        self.stage.close()
        facts = self.stage.facts
        for name, value in merging.items():
            setattr(facts.require_spec().merging, name, value)
        settled = submissions or [
            s for s in facts.window("submit", 1).require_settled().submissions if s.miner in self.states
        ]
        agreed = agree(facts, 1, read_reports(facts, 1), settled, lambda _: 1.0)
        folder = self.folder / out
        folder.mkdir()
        origins = {**dict.fromkeys(self.states, self.parent), **(bases or {})}
        files = Files(self.parent, self.momentum, self.states, origins, self.earlier)
        return merge_cycle(facts, 1, settled, agreed, {}, files, distance, folder)


@pytest.fixture
def desk(stage: Stage, tmp_path: Path) -> Desk:
    return Desk(stage, tmp_path)


def verdicts(merged: Merged) -> dict[str, cycle_pb2.Verdict]:
    return {verdict.miner: verdict for verdict in merged.scored.verdicts}


def test_the_mean_of_good_work_is_published(desk: Desk) -> None:
    desk.submit("MA", START + 0.5, 0.2)
    desk.submit("MB", row([0.9, 0.5, 0.1]), 0.1)
    desk.submit("MC", START - 5.0, 0.0)

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)

    version = merged.version
    assert version.gate == cycle_pb2.GATE_DECISION_ACCEPTED
    assert (version.version, version.parent) == (1, 0)
    assert dict(zip(version.merged, version.weights, strict=True)) == {"MA": 0.5, "MB": 0.5}
    np.testing.assert_allclose(load(merged.state), row([0.7, 0.5, 0.3]), rtol=1e-6)
    np.testing.assert_allclose(load(merged.momentum), -(row([0.7, 0.5, 0.3])), rtol=1e-6)
    assert [(loss.domain, loss.before > loss.after) for loss in version.losses] == [("medical", True), ("code", False)]
    assert verdicts(merged)["MC"].status == cycle_pb2.VERDICT_STATUS_REJECTED
    assert version.state.digest == hashlib.sha256(merged.state.read_bytes()).hexdigest()
    assert read_header(merged.state).metadata == {"version": "0"}


def test_works_of_earlier_cycles_are_unlocked_and_compared(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of both cycles, each from the state that it began from, reach the judgement, and what it finds is refused."""
    for miner, value in (("MA", START + 0.5), ("MB", row([0.9, 0.5, 0.1]))):
        desk.submit(miner, value, 0.2)
    before, began, locked = desk.folder / "before", desk.folder / "began", desk.folder / "locked"
    write_tensors(began, {NAME: np.asarray(START - 1.0, np.float32)})
    write_tensors(before, {NAME: np.asarray(START - 0.5, np.float32)})
    content = hashlib.sha256(before.read_bytes()).hexdigest()
    lock_file(before, locked, b"k" * 32, content)
    entry = cycle_pb2.Submission(miner="MZ", artifact=ArtifactRef(digest="aa", key=b"k" * 32, content=content))
    desk.earlier = [EarlierWork(entry, locked, began)]
    told = Refusal(reasons_pb2.REASON_COPY, cycle_pb2.Finding(kind=cycle_pb2.FINDING_KIND_COPY, copy_of="MZ"))

    def judge(
        asked: object, sound: object, earlier: list[cycle_pb2.Submission], grams: Any, *_: object
    ) -> dict[str, Refusal]:
        assert earlier == [entry]
        np.testing.assert_allclose(np.diag(grams[0])[:2], [1.5, 1.5])
        assert grams[0].shape == grams[1].shape == (3, 3)
        return {"MA": told}

    monkeypatch.setattr("connito.protocol.merging.cycle.handed_in_again", judge)
    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)
    assert list(merged.version.merged) == ["MB"]
    assert verdicts(merged)["MA"].finding.copy_of == "MZ"


@pytest.mark.parametrize("codec", ["int8", "rows"])
def test_what_was_handed_in_before_is_not_merged_where_works_are_coded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    training = desk.stage.facts.require_spec().training
    training.codec = codec
    for miner, value in (("MA", START + 0.5), ("MB", row([0.9, 0.5, 0.1])), ("MC", START)):
        desk.submit(miner, value, 0.0 if miner == "MC" else 0.2)
        if codec != "rows":
            rows, coded = desk.states[miner], desk.folder / f"{miner}.coded"
            encode(rows, desk.parent, training, None, coded, desk.folder / "leaves")
            desk.states[miner] = coded
    again = Refusal(reasons_pb2.REASON_COPY, cycle_pb2.Finding(kind=cycle_pb2.FINDING_KIND_COPY, copy_of="MZ"))
    monkeypatch.setattr(
        copies,
        "handed_in_before",
        lambda facts, cycle, works: {work.miner: again for work in works if work.miner != "MA"},
    )
    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)
    assert list(merged.version.merged) == (["MA", "MB"] if codec == "rows" else ["MA"])
    assert (verdicts(merged)["MB"].reason == reasons_pb2.REASON_COPY) is (codec != "rows")
    assert verdicts(merged)["MC"].reason != reasons_pb2.REASON_COPY, "who moved nothing copied nobody"


def test_one_file_that_two_handed_in_is_decoded_twice_at_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    training = desk.stage.facts.require_spec().training
    training.codec = "int8"
    desk.submit("MA", START + 0.5, 0.2)
    coded, met = desk.folder / "coded", threading.Barrier(2)
    encode(desk.states["MA"], desk.parent, training, None, coded, desk.folder / "leaves")
    desk.states = dict.fromkeys(("MA", "MB"), coded)
    desk.utilities["MB"] = 0.2

    def at_once(*args: Any) -> Path:
        met.wait(60)
        path = decoded(*args)
        met.wait(60)
        return path

    monkeypatch.setattr(opened, "usable_cores", lambda: 2)
    monkeypatch.setattr(opened, "decoded", at_once)
    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)
    assert list(merged.version.merged) == ["MA"]
    assert verdicts(merged)["MB"].finding.copy_of == "MA"
    np.testing.assert_allclose(load(merged.state), START + 0.5, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "value", "merged"),
    [
        (cycle_pb2.FINDING_KIND_NO_GAIN, [-1.0, 2.4, 2.4], ["MA", "MB"]),
        (cycle_pb2.FINDING_KIND_NO_GAIN, [-9.0, 9.0, -9.0], ["MA"]),
        (cycle_pb2.FINDING_KIND_FALSE_CLAIM, [-1.0, 2.4, 2.4], ["MA"]),
        (cycle_pb2.FINDING_KIND_GENERAL_LOSS_ROSE, [-1.0, 2.4, 2.4], ["MA"]),
    ],
)
def test_work_that_gains_with_others_alone_is_merged_with_them_and_not_paid(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, kind: int, value: list[float], merged: list[str]
) -> None:
    """Alone MB ends farther from the goal; half-way between MA and MB is nearest, or farther too where MB only harms."""
    facts, report = desk.stage.facts, desk.stage.report
    facts.require_selection().layers.add(layer=0, experts=[0, 1], use=[0.5, 0.5])
    desk.submit("MA", row([1.6, 0.2, 0.2]), 0.2)
    desk.submit("MB", row(value), 0.0)

    def found(validator: str, utilities: dict[str, float], **changes: Any) -> cycle_pb2.ScoreReport:
        made = report(validator, utilities, **changes)
        made.scores[1].reason = reasons_pb2.REASON_NOT_SIGNIFICANT
        made.scores[1].finding.kind = kind  # type: ignore[assignment]
        return made

    monkeypatch.setattr(desk.stage, "report", found)
    result = desk.merge(aggregator="mean", outer_learning_rate=1.0, gate_general_margin=9.0)
    assert list(result.version.merged) == merged
    wide = result.version.gate == cycle_pb2.GATE_DECISION_WITH_GAINLESS
    assert wide == (len(merged) == 2)
    assert (verdicts(result)["MB"].reward, verdicts(result)["MB"].status) == (0, cycle_pb2.VERDICT_STATUS_REJECTED)
    # An audit builds what the version names, from the same facts and files, without a model.
    folder, facts = desk.folder / "again", desk.stage.facts
    folder.mkdir()
    settled = [s for s in facts.window("submit", 1).require_settled().submissions if s.miner in desk.states]
    agreed = agree(facts, 1, read_reports(facts, 1), settled, lambda _: 1.0)
    files = Files(desk.parent, None, desk.states, dict.fromkeys(desk.states, desk.parent))
    again = merge_cycle(facts, 1, settled, agreed, {}, files, result.version, folder)
    assert (again.version, again.scored) == (result.version, result.scored)


def test_the_report_is_told_sequence_by_sequence(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = distance

    def by_sequence(part: str, digest: str, path: Path) -> Losses:
        whole = plain(part, digest, path)
        rows: dict[str, tuple[tuple[float, ...], tuple[int, ...]]] = {
            domain: ((nll / 2, nll / 2), (1, 1)) for domain, (nll, _) in whole.sums.items()
        }
        return Losses({domain: (nll, 2) for domain, (nll, _) in whole.sums.items()}, rows)

    desk.submit("MA", START + 0.5, 0.2)
    monkeypatch.setitem(Desk.merge.__globals__, "distance", by_sequence)
    version = desk.merge(aggregator="mean", outer_learning_rate=1.0).version
    for loss in version.losses:
        assert sum(loss.before_sums) / sum(loss.sequence_tokens) == loss.before
        assert sum(loss.after_sums) / sum(loss.sequence_tokens) == loss.after
    assert not any(loss.before_sums for loss in version.gate_losses)


def test_momentum_of_the_parent_carries_on(desk: Desk) -> None:
    desk.submit("MA", START + 0.2, 0.2)
    desk.momentum = desk.folder / "momentum"
    write_tensors(desk.momentum, {NAME: np.full((2, 3), -0.1, np.float32)})

    merged = desk.merge(aggregator="mean", outer_learning_rate=0.5, outer_momentum=0.9)

    velocity = 0.9 * -0.1 - 0.2
    np.testing.assert_allclose(load(merged.momentum), np.full((2, 3), velocity), rtol=1e-6)
    np.testing.assert_allclose(load(merged.state), np.full((2, 3), -0.5 * (-0.2 + 0.9 * velocity)), rtol=1e-6)


def test_a_copy_is_blamed_on_the_later_commitment_and_not_merged(desk: Desk) -> None:
    desk.submit("MA", START + 0.5, 0.2)
    desk.submit("MB", START + 0.5001, 0.21)

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)

    assert verdicts(merged)["MB"].reason == reasons_pb2.REASON_COPY
    found = verdicts(merged)["MB"].finding
    assert (found.kind, found.copy_of) == (cycle_pb2.FINDING_KIND_COPY, "MA")
    assert 0.99 < found.cosine <= 1.0
    assert list(merged.version.merged) == ["MA"]
    assert verdicts(merged)["MA"].reward == 100


def test_an_outlier_that_scored_is_left_out_when_the_gate_says_so(desk: Desk) -> None:
    desk.submit("MA", row([0.5, 0.4, 0.3]), 0.2)
    desk.submit("MB", row([0.3, 0.4, 0.6]), 0.1)
    desk.submit("MC", row([9.0, 0.0, 1.0]), 0.15)

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)

    assert merged.version.gate == cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS
    assert list(merged.version.merged) == ["MA", "MB"]
    assert verdicts(merged)["MC"].status == cycle_pb2.VERDICT_STATUS_SCORED
    assert verdicts(merged)["MC"].reason == reasons_pb2.REASON_OUTLIER
    assert verdicts(merged)["MC"].reward > 0
    assert detail_of(merged.version).startswith("all together: medical loss would rise")


def test_the_best_alone_is_the_state_that_was_measured(desk: Desk) -> None:
    desk.submit("MA", row([0.5, 0.4, 0.3]), 0.1)
    desk.submit("MB", row([0.3, 0.6, 0.4]), 0.2)
    desk.momentum = desk.folder / "momentum"
    write_tensors(desk.momentum, {NAME: np.full((2, 3), 50.0, np.float32)})

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0, outer_momentum=0.9)

    assert merged.version.gate == cycle_pb2.GATE_DECISION_TOP_1
    np.testing.assert_allclose(load(merged.state), load(desk.states["MB"]), atol=1e-7)
    np.testing.assert_allclose(load(merged.momentum), -load(desk.states["MB"]), atol=1e-7)
    assert verdicts(merged)["MA"].reason == reasons_pb2.REASON_GATE_REJECTED


def test_a_refused_merge_leaves_incumbent_and_momentum_as_they_were(desk: Desk) -> None:
    desk.submit("MA", START - 1.0, 0.2)
    desk.momentum = desk.folder / "momentum"
    write_tensors(desk.momentum, {NAME: np.full((2, 3), 0.25, np.float32)})

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)

    version = merged.version
    assert version.gate == cycle_pb2.GATE_DECISION_KEPT_INCUMBENT
    assert (merged.state, merged.momentum) == (desk.parent, desk.momentum)
    assert list(version.merged) == []
    assert all(loss.before == loss.after for loss in version.losses)
    assert verdicts(merged)["MA"].reason == reasons_pb2.REASON_GATE_REJECTED
    assert "the best alone" in detail_of(version)


def test_retention_is_the_gates_business_too(desk: Desk) -> None:
    desk.submit("MA", START + 0.95, 0.2)

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0, gate_general_margin=0.1)

    assert merged.version.gate == cycle_pb2.GATE_DECISION_KEPT_INCUMBENT
    assert "code loss would rise" in detail_of(merged.version)


def test_nothing_that_scored_is_nothing_to_merge(desk: Desk) -> None:
    desk.submit("MA", START + 0.5, 0.0)

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)

    assert merged.version.gate == cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE
    assert merged.version.state.digest == hashlib.sha256(desk.parent.read_bytes()).hexdigest()
    assert merged.scored.unallocated == 100
    assert (detail_of(merged.version), list(merged.version.gate_losses)) == ("", [])
    assert not load(merged.momentum).any()
    assert [loss.before == loss.after for loss in merged.version.losses] == [True, True]


def test_no_submission_at_all_is_nothing_to_merge(desk: Desk) -> None:
    desk.utilities = {}

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)

    assert merged.version.gate == cycle_pb2.GATE_DECISION_NOTHING_TO_MERGE
    assert list(merged.scored.verdicts) == []


def test_hostile_files_cost_only_their_senders(desk: Desk) -> None:
    desk.submit("MA", START + 0.5, 0.2)
    desk.submit("MB", np.full((2, 3), np.nan), 0.9)
    desk.submit("MC", np.zeros((2, 4)), 0.9)

    merged = desk.merge(aggregator="mean", outer_learning_rate=1.0)

    assert list(merged.version.merged) == ["MA"]
    assert verdicts(merged)["MB"].reason == reasons_pb2.REASON_NON_FINITE
    assert verdicts(merged)["MC"].reason == reasons_pb2.REASON_WRONG_SHAPE
    assert verdicts(merged)["MA"].reward == 100


def test_a_step_that_overflows_is_refused_like_any_other(desk: Desk) -> None:
    desk.submit("MA", START + 0.5, 0.2)

    merged = desk.merge(aggregator="mean", outer_learning_rate=1e39, outer_momentum=0.9)

    assert merged.version.gate == cycle_pb2.GATE_DECISION_TOP_1
    assert "overflow" in detail_of(merged.version)


def test_late_work_counts_by_what_it_learnt_from_its_own_base(desk: Desk) -> None:
    """Its base was 0.5 above the parent, so of its 0.8 only 0.3 is what the miner trained."""
    desk.submit("MA", row([0.4, 0.2, 0.3]), 0.2)
    desk.submit("MB", START + 0.8, 0.2)
    base = desk.folder / "old"
    write_tensors(base, {NAME: START + 0.5})

    merged = desk.merge(bases={"MB": base}, aggregator="mean", outer_learning_rate=1.0)

    expected = (np.array([0.4, 0.2, 0.3]) + 0.3) / 2
    np.testing.assert_allclose(load(merged.state), np.broadcast_to(expected, (2, 3)), rtol=1e-6)


def test_restarting_gives_the_same_bytes(desk: Desk, stage: Stage, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for miner in ("MA", "MB", "MC"):
        desk.submit(miner, START + rng.normal(0.5, 0.1, (2, 3)), 0.1)

    one = desk.merge("one", aggregator="geometric-median", outer_learning_rate=0.7, outer_momentum=0.9)
    settled = list(stage.facts.window("submit", 1).require_settled().submissions)[::-1]
    two = desk.merge("two", settled, aggregator="geometric-median", outer_learning_rate=0.7, outer_momentum=0.9)

    assert one.state.read_bytes() == two.state.read_bytes()
    assert one.momentum.read_bytes() == two.momentum.read_bytes()
    assert one.version == two.version
