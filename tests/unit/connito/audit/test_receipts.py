"""A submission's receipt: complete, and as good as what it rests on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from connito.audit.artifacts import Artifacts
from connito.audit.audit import Options
from connito.audit.receipts import SubmissionId, explain, find_miner, receipt
from connito.errors import Invalid, NotFound
from connito.v1 import cycle_pb2 as c

from tests.unit.connito.audit.world import MINERS, RUN, VALIDATORS, World, tell

QUICK = Options(model=False, tolerance=0.0)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> World:
    return tell(tmp_path_factory.mktemp("told"))


@pytest.fixture
def world(told: World) -> World:
    return told.copy()


def test_the_receipt_holds_everything_that_the_result_rests_on(told: World) -> None:
    found = receipt(told.evidence(), 1, MINERS["A"])
    assert found["label"] == "miner-A"
    assert found["inputs"]["artifact"]["digest"] in told.objects
    assert set(found["draw"]["validators"]) == set(VALIDATORS.values())
    assert [len(report["losses"]) for report in found["reports"]] == [10, 10, 10]
    assert (found["verdict"]["rank"], found["verdict"]["status"]) == (1, "merged")
    said = {row["message"] for row in found["signatures"]}
    assert said >= {"ingress.commitment", "ingress.reveal", "commit.1.accepted", "submit.1.accepted",
                    "validate.1.report", "merge.1.scored", "merge.1.version"}  # fmt: skip
    assert found["refusals"][0]["reason"] == "duplicate-commitment"


async def test_honest_work_a_copy_and_late_work_are_explained(told: World, tmp_path: Path) -> None:
    artifacts, evidence = await told.artifacts(tmp_path), told.evidence()
    for cycle, name, status in ((1, "A", "merged"), (1, "C", "rejected"), (2, "L", "merged")):
        found = explain(evidence, artifacts, cycle, MINERS[name], QUICK).to_json()
        assert found["result"] == "same", found["differences"]
        assert found["verdict"]["status"] == status
    late = receipt(evidence, 2, MINERS["L"])
    assert (late["origin_cycle"], late["inputs"]["reveal_sequence"] > 0) == (1, True)


async def test_without_any_file_the_log_alone_is_explained(world: World) -> None:
    """A miner has no key to the store; what validators signed and the ranks that follow from it are in the log."""
    options = replace(QUICK, files=False)
    for cycle, name, status in ((1, "A", "merged"), (1, "C", "rejected"), (2, "L", "merged")):
        found = explain(world.evidence(), Artifacts(), cycle, MINERS[name], options).to_json()
        assert found["result"] == "same", found["differences"]
        assert found["verdict"]["status"] == status
        assert "artifacts" not in [step["check"] for step in found["checks"]]

    def change(message: c.ScoreReport) -> None:
        score = next(score for score in message.scores if score.miner == MINERS["B"])
        score.losses[0].after -= 0.001

    world.resign("validate.1.report.{v1}", change, c.ScoreReport)
    assert explain(world.evidence(), Artifacts(), 1, MINERS["B"], options).differences


async def test_someone_elses_trouble_is_not_in_it(world: World, tmp_path: Path) -> None:
    def change(message: c.ScoreReport) -> None:
        score = next(score for score in message.scores if score.miner == MINERS["B"])
        score.losses[0].after -= 0.001

    world.resign("validate.1.report.{v1}", change, c.ScoreReport)
    artifacts, evidence = await world.artifacts(tmp_path), world.evidence()
    theirs = explain(evidence, artifacts, 1, MINERS["B"], QUICK)
    assert theirs.differences[0].check == "reports"
    assert "report" in theirs.differences[0].where
    assert explain(evidence, artifacts, 1, MINERS["A"], QUICK).differences == []
    assert explain(evidence, artifacts, 2, MINERS["B"], QUICK).differences == []


async def test_a_damaged_artifact_is_the_difference(world: World, tmp_path: Path) -> None:
    settled = world.evidence().facts.window("submit", 1).settled
    assert settled is not None
    digest = next(entry.artifact.digest for entry in settled.submissions if entry.miner == MINERS["B"])
    world.objects[digest] += b"!"
    found = explain(world.evidence(), await world.artifacts(tmp_path), 1, MINERS["B"], QUICK)
    assert found.differences[0].check == "artifacts"
    assert found.differences[0].where.startswith("submission of miner-B")


def test_a_submission_is_named_by_run_cycle_and_miner(told: World) -> None:
    evidence = told.evidence()
    assert SubmissionId.parse("a/2/b") == SubmissionId("a", 2, "b")
    for text in ("a/b", "a/x/b", "a/1/", "a/1/b/c"):
        with pytest.raises(Invalid, match="<run>/<cycle>/<miner>"):
            SubmissionId.parse(text)
    for name in ("miner-B", MINERS["B"], MINERS["B"][:10]):
        assert find_miner(evidence, SubmissionId(RUN, 1, name)) == MINERS["B"]
    with pytest.raises(NotFound, match="miner-A"):
        find_miner(evidence, SubmissionId(RUN, 1, "nobody"))


def test_who_said_nothing_has_no_receipt(told: World) -> None:
    with pytest.raises(NotFound, match="said nothing in cycle 5"):
        receipt(told.evidence(), 5, MINERS["A"])
