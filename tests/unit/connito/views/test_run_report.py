"""The report: a public document, and a pure function of a run's facts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from connito.errors import ConnitoError
from connito.local.outcome import check_outcome
from connito.local.proof import markdown
from connito.v1 import cycle_pb2, reasons_pb2, run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.views.live import announce, phase
from connito.views.loss_plot import loss_svg
from connito.views.proof_plot import Row, proof_svg
from connito.views.run_report import run_report
from connito.wire.fact import Fact
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.subjects import WINDOWS, FactKey
from google.protobuf.message import Message

RUN = "run-1"
ADA, BEN, EVE, LEA, OLA, ZOE = (Identity.generate(bytes([n]) * 32).public for n in range(1, 7))
LABELS = {ADA: "ada", BEN: "ben", EVE: "eve", LEA: "lea", OLA: "ola", ZOE: ""}


class Log:
    """Facts with rising sequences, a second apart."""

    def __init__(self) -> None:
        self.facts = RunFacts(RUN)
        self.sequence = 0

    def add(self, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> Fact:
        self.sequence += 1
        key = FactKey(section, cycle, kind, id_)
        fact = Fact(RUN, key, message, "signer", section.upper(), self.sequence, 1_000_000 + 1000 * self.sequence)
        assert self.facts.add(fact)
        return fact

    def refuse(self, window: str, miner: str, reason: reasons_pb2.Reason.ValueType, detail: str = "why") -> None:
        kind = cycle_pb2.Window.Value(f"WINDOW_{window.upper()}")
        refused = cycle_pb2.Refused(
            run=RUN, cycle=1, window=kind, miner=miner, reason=reason, detail=detail, ingress_sequence=self.sequence
        )
        self.add(window, 1, "refused", refused, f"{miner}-{self.sequence}")


def started() -> Log:
    log = Log()
    spec = run_pb2.RunSpec(run=RUN, domain="medical", cycles=1, base=run_pb2.BaseRef(name="tiny"))
    log.add("run", 0, "created", run_pb2.RunCreated(spec=spec))
    for key, label in LABELS.items():
        log.add("run", 0, "miner", run_pb2.MinerEnrolled(run=RUN, miner=key, label=label), key)
    layers = [run_pb2.LayerSelection(layer=2, experts=[5, 1]), run_pb2.LayerSelection(layer=3, experts=[0])]
    selection = run_pb2.SelectionMade(
        run=RUN, layers=layers, selected_experts=3, total_experts=16, target_parameters=30, model_parameters=400
    )
    log.add("run", 0, "selected", selection)
    for window in WINDOWS:
        opened = cycle_pb2.WindowOpened(run=RUN, cycle=1, expected=sorted(LABELS) if window == "train" else [])
        log.add(window, 1, "opened", opened)
        if window == "train":
            log.add(window, 1, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=1))
    return log


def finished() -> Log:
    log = started()
    for key in (ADA, BEN, EVE, LEA, OLA):
        log.add("commit", 1, "accepted", cycle_pb2.CommitmentAccepted(run=RUN, cycle=1, miner=key), key)
    log.refuse("commit", ADA, reasons_pb2.REASON_DUPLICATE_COMMITMENT)
    log.refuse("submit", OLA, reasons_pb2.REASON_OVERSIZED)
    log.refuse("submit", LEA, reasons_pb2.REASON_NOT_REVEALED)
    log.refuse("submit", LEA, reasons_pb2.REASON_LATE_REVEAL)
    submissions = [
        cycle_pb2.Submission(miner=key, artifact=ArtifactRef(digest="d", size=size), origin_cycle=1)
        for key, size in ((ADA, 100), (BEN, 120), (EVE, 140))
    ]
    log.add("submit", 1, "settled", cycle_pb2.WindowSettled(run=RUN, cycle=1, submissions=submissions))
    verdicts = [
        cycle_pb2.Verdict(
            miner=BEN, status=cycle_pb2.VERDICT_STATUS_MERGED, utility=0.02, rank=1, reward=7, weight=0.6
        ),
        cycle_pb2.Verdict(
            miner=ADA, status=cycle_pb2.VERDICT_STATUS_MERGED, utility=0.01, rank=2, reward=3, weight=0.4
        ),
        cycle_pb2.Verdict(
            miner=EVE, status=cycle_pb2.VERDICT_STATUS_REJECTED, reason=reasons_pb2.REASON_COPY, detail="of ben"
        ),
    ]
    log.add("merge", 1, "scored", cycle_pb2.CycleScored(run=RUN, cycle=1, verdicts=verdicts))
    losses = [
        cycle_pb2.DomainLoss(domain="medical", before=3.0, after=2.9, tokens=100),
        cycle_pb2.DomainLoss(domain="code", before=2.0, after=2.1, tokens=50),
        cycle_pb2.DomainLoss(domain="a<b", before=4.0, after=4.0, tokens=50),
    ]
    version = cycle_pb2.VersionPublished(
        run=RUN, cycle=1, version=1, state=ArtifactRef(digest="abc"), merged=sorted([ADA, BEN]), losses=losses,
        gate=cycle_pb2.GATE_DECISION_WITHOUT_OUTLIERS,
    )  # fmt: skip
    log.add("merge", 1, "version", version)
    log.add("merge", 1, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=1))
    ended = run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_COMPLETED, detail="done", final_version=1)
    log.add("run", 0, "ended", ended)
    deposited = run_pb2.ExpertDeposited(run=RUN, expert_id="medical-1", expert=ArtifactRef(digest="e1", size=9))
    log.add("library", 0, "deposited", deposited, "medical-1")
    return log


def rows(report: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {row["miner"]: (row["status"], row["reason"]) for row in report["cycles"][0]["submissions"]}


def test_the_layout_that_others_rely_on() -> None:
    report = run_report(finished().facts, model_bytes=1200, totals={"peak_memory_bytes": 5})
    assert {"run", "base", "domain", "cycles", "library", "totals"} <= set(report)
    assert set(report["cycles"][0]) >= {
        "cycle", "model_version", "target_loss_before", "target_loss_after", "general_loss_before", "general_loss_after",
        "submissions", "merged", "gate", "upload_bytes_per_miner", "seconds",
    }  # fmt: skip
    row = report["cycles"][0]["submissions"][0]
    assert set(row) >= {"miner", "status", "reason", "utility", "rank", "reward"}
    assert report["library"] == {"expert_id": "medical-1", "digest": "e1", "bytes": 9}
    assert report["outcome"] == {"status": "completed", "reason": "", "detail": "done"}


def test_figures_come_from_the_version_and_the_settled_submissions() -> None:
    report = run_report(finished().facts, model_bytes=1200, totals={"peak_memory_bytes": 5})
    cycle, totals = report["cycles"][0], report["totals"]
    assert (cycle["target_loss_before"], cycle["target_loss_after"]) == (3.0, 2.9)
    assert (cycle["general_loss_before"], cycle["general_loss_after"]) == (3.0, 3.05)
    assert cycle["upload_bytes_per_miner"] == 120
    assert cycle["gate"] == "without-outliers"
    assert cycle["seconds"]["train"] == 1.0
    assert set(cycle["seconds"]) == {"train", "merge"}  # Windows without a close have no length.
    assert totals["upload_share_of_model"] == 0.1
    assert totals["peak_memory_bytes"] == 5
    assert totals["rewards"] == {"ben": 7, "ada": 3, "eve": 0, "lea": 0, "ola": 0, f"{ZOE[:12]}…": 0}


def test_everybody_who_was_expected_is_accounted_for_best_rank_first() -> None:
    report = run_report(finished().facts)
    assert (
        rows(report)
        == {
            "ben": ("merged", ""),
            "ada": ("merged", ""),  # The second commitment was refused; the first one was scored.
            "eve": ("rejected", "copy"),
            "ola": ("refused", "oversized"),
            "lea": ("refused", "late-reveal"),  # Says more than that it was not revealed in time.
            f"{ZOE[:12]}…": ("absent", ""),
        }
    )
    assert [row["miner"] for row in report["cycles"][0]["submissions"]][:2] == ["ben", "ada"]
    assert report["cycles"][0]["merged"] == ["ben", "ada"]


def test_a_run_that_goes_on_has_a_report_too() -> None:
    report = run_report(started().facts)
    assert report["cycles"] == []
    assert report["library"] is None
    assert report["outcome"]["status"] == "running"
    assert report["totals"]["target_loss_first"] is None


def test_the_plot_is_well_formed_and_shows_each_value_and_domain() -> None:
    report = run_report(finished().facts)
    text = "".join(ElementTree.fromstring(loss_svg(report)).itertext())
    assert "3.0000" in text
    assert "2.9000" in text
    assert "a<b" in text
    ElementTree.fromstring(loss_svg(run_report(started().facts)))


def test_the_proof_says_what_is_right_and_on_how_much_text() -> None:
    example = {"prompt": "one\ntwo", "reference": "", "before": "b", "after": "a"}
    better = {
        "use": "target",
        "before": 0.1,
        "after": 0.3,
        "change": 0.2,
        "low": 0.1,
        "high": 0.3,
        "count": 1200,
        "texts": 40,
    }
    same = better | {"use": "general", "change": 0.0, "low": -0.1, "high": 0.1, "after": 0.1}
    rows: list[dict[str, Any]] = [
        {"domain": "medical", "what": "next word", **better},
        {"domain": "law", "what": "next word", **same},
    ]
    text = markdown(
        run_report(finished().facts), {"rows": rows, "examples": [example, example], "precision": "bfloat16"}
    )
    assert "bfloat16" in text
    assert text.count("> one\n> two") == 2
    assert "10.0 % | 30.0 % | +20.0 | +10.0 to +30.0 | 1,200 in 40 texts | better |" in text
    assert "no difference that this much text can show" in text
    assert "3.0000 → 2.9000" in text
    ElementTree.fromstring(proof_svg("r", [Row(**row) for row in rows]))


def test_lines_say_what_happened_and_to_whom() -> None:
    log = started()
    refused = cycle_pb2.Refused(run=RUN, cycle=1, miner=OLA, reason=reasons_pb2.REASON_OVERSIZED, detail="too big")
    fact = log.add("submit", 1, "refused", refused, f"{OLA}-1")
    assert announce(fact, log.facts, {}) == "cycle 1 · ola refused: oversized (too big)"
    assert announce(fact, log.facts, {OLA: "oversized-1"}) == "cycle 1 · oversized-1 refused: oversized (too big)"


def test_the_phase_names_window_and_time_left() -> None:
    log = Log()
    assert phase(log.facts, 0) == "submitting the job"
    spec = run_pb2.RunSpec(run=RUN, cycles=2, windows=run_pb2.WindowPolicy(min_miners=3, min_validators=2))
    log.add("run", 0, "created", run_pb2.RunCreated(spec=spec))
    assert phase(log.facts, 0) == "selecting the experts that the domain uses"
    log.add("run", 0, "selected", run_pb2.SelectionMade(run=RUN))
    assert phase(log.facts, 0) == "waiting for people: 0 of 3 miners and 0 of 2 validators here"
    opened = log.add("train", 1, "opened", cycle_pb2.WindowOpened(run=RUN, cycle=1, deadline_unix_ms=1_010_000))
    now = opened.time_unix_ms + 2000
    assert phase(log.facts, now) == (
        f"cycle 1 of 2: train, miners train (2 s; closes at the latest in {(1_010_000 - now) / 1000:.0f} s)"
    )
    log.add("train", 1, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=1))
    assert phase(log.facts, now) == "cycle 1 of 2: between windows"


@pytest.mark.parametrize(
    ("status", "reason", "code"),
    [("failed", "too-few-miners", 5), ("failed", "bad-spec", 3), ("failed", "", 1), ("cancelled", "cancelled", 1)],
)
def test_a_run_that_did_not_complete_is_an_error_that_says_why(status: str, reason: str, code: int) -> None:
    report = {"run": RUN, "outcome": {"status": status, "reason": reason, "detail": "ada left"}}
    with pytest.raises(ConnitoError, match="ada left") as raised:
        check_outcome(report, Path("logs"))
    assert raised.value.exit_code == code


def test_a_run_that_completed_is_none() -> None:
    check_outcome({"run": RUN, "outcome": {"status": "completed", "reason": "", "detail": ""}}, Path("logs"))
