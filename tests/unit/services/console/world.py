"""A run of two cycles. Cycle 1 is over; in cycle 2 the validators score."""

from __future__ import annotations

from connito.v1 import cycle_pb2, run_pb2
from connito.v1.reasons_pb2 import REASON_LATE_COMMITMENT, REASON_NOT_SIGNIFICANT

from tests.support.run import RUN, Run, theta

START = 1_000_000
MERGED, UNSURE, LATE = "UMERGED", "UUNSURE", "ULATE"
V1, V2 = "UVALIDATORONE", "UVALIDATORTWO"
CHANCE = "0.01 is within chance"

__all__ = ["CHANCE", "LATE", "MERGED", "RUN", "START", "UNSURE", "V1", "V2", "a_run", "begun", "end"]


def begun() -> Run:
    """Selected, with three miners and two validators. Each fact comes a second after the one before."""
    run = Run(now=START - 1000, step_ms=1000)
    scoring = run_pb2.ScorePolicy(retention_margin=0.02, confidence=0.95)
    run.created(base=run_pb2.BaseRef(name="tiny"), scoring=scoring)
    layers = [
        run_pb2.LayerSelection(layer=1, experts=[5, 2], helpers=[0]),
        run_pb2.LayerSelection(layer=0, experts=[3]),
    ]
    run.selected(layers=layers, selected_experts=3, total_experts=24, target_parameters=300, model_parameters=3000)
    for miner, label in ((MERGED, "alice"), (UNSURE, "<b>bob"), (LATE, "")):
        run.miners(miner, label=label)
    return run.validators(V1, V2)


def opened(run: Run, window: str, cycle: int, *expected: str) -> None:
    run.opened(window, cycle, expected, deadline_unix_ms=run.now + 61_000)


def first_windows(run: Run, cycle: int) -> None:
    """Train, commit and submit. One miner trains, but commits too late."""
    opened(run, "train", cycle, MERGED, UNSURE, LATE)
    for miner, after in ((MERGED, 1000), (UNSURE, 2000), (LATE, 9000)):
        run.now += after - run.step_ms
        run.trained(miner, cycle, steps=8, tokens=512, seconds=1.5)
    run.closed("train", cycle, cause=cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    opened(run, "commit", cycle, MERGED, UNSURE, LATE)
    run.committed(MERGED, cycle).committed(UNSURE, cycle)
    run.closed("commit", cycle, cause=cycle_pb2.CLOSE_CAUSE_DEADLINE)
    run.refused("commit", LATE, cycle, REASON_LATE_COMMITMENT, detail="1.0 s late", ingress_sequence=9)
    opened(run, "submit", cycle, MERGED, UNSURE)
    for miner in (MERGED, UNSURE):
        run.submitted(miner, cycle, artifact=theta(9))
    run.closed("submit", cycle, cause=cycle_pb2.CLOSE_CAUSE_ALL_ACTED)


def validate(run: Run, cycle: int) -> None:
    """The first validator reports, the second is silent."""
    opened(run, "validate", cycle, V1, V2)
    run.drawn(V1, cycle=cycle, omitted=[V2])
    scores = [
        cycle_pb2.SubmissionScore(
            miner=MERGED, utility=0.05, effect=0.05, effect_low=0.02, effect_high=0.08, general_change=0.001,
            general_change_high=0.01,
        ),
        cycle_pb2.SubmissionScore(
            miner=UNSURE, effect=0.01, effect_low=-0.02, effect_high=0.04, reason=REASON_NOT_SIGNIFICANT, detail=CHANCE,
        ),
    ]  # fmt: skip
    run.reported(V1, cycle, scores=scores)


def merge(run: Run, cycle: int) -> None:
    opened(run, "merge", cycle)
    accepted, rejected = cycle_pb2.VERDICT_STATUS_MERGED, cycle_pb2.VERDICT_STATUS_REJECTED
    verdicts = [
        cycle_pb2.Verdict(miner=MERGED, status=accepted, utility=0.05, rank=1, reward=100, weight=1.0),
        cycle_pb2.Verdict(miner=UNSURE, status=rejected, reason=REASON_NOT_SIGNIFICANT, detail=CHANCE),
    ]
    standings = [
        cycle_pb2.ValidatorStanding(validator=V1, reported=True, deviation=0.003),
        cycle_pb2.ValidatorStanding(validator=V2, reported=False),
    ]
    run.scored(*verdicts, cycle=cycle, validators=standings)
    losses = [
        cycle_pb2.DomainLoss(domain="medical", before=2.0, after=1.9),
        cycle_pb2.DomainLoss(domain="code", before=3.0, after=3.01),
    ]
    run.merged(
        cycle, losses=losses, gate_losses=losses, gate=cycle_pb2.GATE_DECISION_ACCEPTED, merged=[MERGED], weights=[1.0]
    )
    run.closed("merge", cycle, cause=cycle_pb2.CLOSE_CAUSE_ALL_ACTED)


def end(run: Run) -> None:
    """The run completes and its expert goes to the library."""
    run.ended(final_version=1)
    run.say("library", 0, "deposited", expert_id="medical-1", domain="medical", expert=theta(1, 2048))


def a_run() -> Run:
    """Cycle 1 is over, in cycle 2 one of two validators has reported."""
    run = begun()
    first_windows(run, 1)
    validate(run, 1)
    run.closed("validate", 1, cause=cycle_pb2.CLOSE_CAUSE_ALL_ACTED)
    merge(run, 1)
    first_windows(run, 2)
    validate(run, 2)
    return run
