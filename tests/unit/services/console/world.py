"""A run of two cycles, told fact by fact. Cycle 1 is over; in cycle 2 the validators score."""

from __future__ import annotations

from dataclasses import dataclass, field

from connito.bus.streams import stream_of
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.v1.reasons_pb2 import REASON_LATE_COMMITMENT, REASON_NOT_SIGNIFICANT, REASON_UNSPECIFIED
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import FactKey, fact, ingress
from google.protobuf.message import Message

RUN = "r1"
START = 1_000_000
MERGED, UNSURE, LATE = "UMERGED", "UUNSURE", "ULATE"
V1, V2 = "UVALIDATORONE", "UVALIDATORTWO"


def state(number: int) -> ArtifactRef:
    return ArtifactRef(digest=f"{number:064x}", size=2048, realm=REALM_PUBLIC)


@dataclass
class Story:
    """Writes facts; `now` is the broker's clock."""

    now: int = START
    facts: RunFacts = field(default_factory=lambda: RunFacts(RUN))
    sequences: dict[str, int] = field(default_factory=dict)

    def tell(
        self, section: str, cycle: int, kind: str, message: Message, id_: str = "", *, after_ms: int = 1000
    ) -> None:
        subject = ingress(RUN, id_, kind) if section == "ingress" else fact(RUN, section, cycle, kind, id_)
        self.now += after_ms
        stream = stream_of(subject)
        self.sequences[stream] = self.sequences.get(stream, 0) + 1
        self.facts.add(
            Fact(RUN, FactKey(section, cycle, kind, id_), message, id_, stream, self.sequences[stream], self.now)
        )

    def begin(self) -> None:
        spec = run_pb2.RunSpec(
            run=RUN,
            domain="medical",
            cycles=3,
            base=run_pb2.BaseRef(name="tiny"),
            scoring=run_pb2.ScorePolicy(retention_margin=0.02, confidence=0.95),
        )
        self.tell("run", 0, "created", run_pb2.RunCreated(spec=spec), after_ms=0)
        layers = [
            run_pb2.LayerSelection(layer=1, experts=[5, 2], helpers=[0]),
            run_pb2.LayerSelection(layer=0, experts=[3]),
        ]
        made = run_pb2.SelectionMade(
            run=RUN, layers=layers, initial_state=state(0), selected_experts=3, total_experts=24,
            target_parameters=300, model_parameters=3000,
        )  # fmt: skip
        self.tell("run", 0, "selected", made)
        for miner, label in ((MERGED, "alice"), (UNSURE, "<b>bob"), (LATE, "")):
            self.tell("run", 0, "miner", run_pb2.MinerEnrolled(run=RUN, miner=miner, label=label), miner)
        for validator in (V1, V2):
            self.tell("run", 0, "validator", run_pb2.ValidatorJoined(run=RUN, validator=validator), validator)

    def open(self, window: str, cycle: int, expected: list[str], *, lasts_ms: int = 60_000) -> None:
        message = cycle_pb2.WindowOpened(
            run=RUN, cycle=cycle, expected=sorted(expected), deadline_unix_ms=self.now + 1000 + lasts_ms,
            version=cycle - 1, state=state(cycle - 1),
        )  # fmt: skip
        self.tell(window, cycle, "opened", message)

    def close(
        self, window: str, cycle: int, cause: cycle_pb2.CloseCause.ValueType = cycle_pb2.CLOSE_CAUSE_ALL_ACTED
    ) -> None:
        self.tell(window, cycle, "closed", cycle_pb2.WindowClosed(run=RUN, cycle=cycle, cause=cause))

    def first_windows(self, cycle: int) -> None:
        """Train, commit and submit. One miner trains, but commits too late."""
        self.open("train", cycle, [MERGED, UNSURE, LATE])
        for miner, after in ((MERGED, 1000), (UNSURE, 2000), (LATE, 9000)):
            trained = cycle_pb2.TrainingFinished(run=RUN, cycle=cycle, steps=8, tokens=512, seconds=1.5)
            self.tell("ingress", cycle, "trained", trained, miner, after_ms=after)
        self.close("train", cycle)
        self.open("commit", cycle, [MERGED, UNSURE, LATE])
        for miner in (MERGED, UNSURE):
            said = cycle_pb2.Commitment(run=RUN, cycle=cycle, digest=b"d" * 32)
            self.tell("ingress", cycle, "commitment", said, miner)
            self.tell(
                "commit", cycle, "accepted", cycle_pb2.CommitmentAccepted(run=RUN, cycle=cycle, miner=miner), miner
            )
        self.close("commit", cycle, cycle_pb2.CLOSE_CAUSE_DEADLINE)
        refused = cycle_pb2.Refused(
            run=RUN, cycle=cycle, window=cycle_pb2.WINDOW_COMMIT, miner=LATE, reason=REASON_LATE_COMMITMENT,
            detail="1.0 s late", ingress_sequence=9,
        )  # fmt: skip
        self.tell("commit", cycle, "refused", refused, f"{LATE}-9")
        self.open("submit", cycle, [MERGED, UNSURE])
        for miner in (MERGED, UNSURE):
            self.tell("ingress", cycle, "reveal", cycle_pb2.Reveal(run=RUN, cycle=cycle, artifact=state(9)), miner)
            entry = cycle_pb2.Submission(miner=miner, artifact=state(9), origin_cycle=cycle)
            accepted = cycle_pb2.RevealAccepted(run=RUN, cycle=cycle, submission=entry)
            self.tell("submit", cycle, "accepted", accepted, miner)
        self.close("submit", cycle)

    def report(self, validator: str, cycle: int) -> None:
        scores = [
            cycle_pb2.SubmissionScore(
                miner=MERGED, utility=0.05, effect=0.05, effect_low=0.02, effect_high=0.08, general_change=0.001,
                general_change_high=0.01, reason=REASON_UNSPECIFIED,
            ),
            cycle_pb2.SubmissionScore(
                miner=UNSURE, effect=0.01, effect_low=-0.02, effect_high=0.04, reason=REASON_NOT_SIGNIFICANT,
                detail="0.01 is within chance",
            ),
        ]  # fmt: skip
        message = cycle_pb2.ScoreReport(run=RUN, cycle=cycle, validator=validator, scores=scores)
        self.tell("validate", cycle, "report", message, validator)

    def validate(self, cycle: int) -> None:
        self.open("validate", cycle, [V1, V2])
        drawn = cycle_pb2.SeedDrawn(run=RUN, cycle=cycle, validators=[V1], omitted=[V2])
        self.tell("validate", cycle, "drawn", drawn)
        self.report(V1, cycle)

    def merge(self, cycle: int) -> None:
        self.open("merge", cycle, [])
        verdicts = [
            cycle_pb2.Verdict(
                miner=MERGED, status=cycle_pb2.VERDICT_STATUS_MERGED, utility=0.05, rank=1, reward=100, weight=1.0
            ),
            cycle_pb2.Verdict(
                miner=UNSURE, status=cycle_pb2.VERDICT_STATUS_REJECTED, reason=REASON_NOT_SIGNIFICANT,
                detail="0.01 is within chance",
            ),
        ]  # fmt: skip
        standings = [
            cycle_pb2.ValidatorStanding(validator=V1, reported=True, deviation=0.003),
            cycle_pb2.ValidatorStanding(validator=V2, reported=False),
        ]
        scored = cycle_pb2.CycleScored(run=RUN, cycle=cycle, verdicts=verdicts, validators=standings)
        self.tell("merge", cycle, "scored", scored)
        losses = [
            cycle_pb2.DomainLoss(domain="medical", before=2.0, after=1.9),
            cycle_pb2.DomainLoss(domain="code", before=3.0, after=3.01),
        ]
        version = cycle_pb2.VersionPublished(
            run=RUN, cycle=cycle, version=cycle, parent=cycle - 1, state=state(cycle), losses=losses,
            gate_losses=losses, gate=cycle_pb2.GATE_DECISION_ACCEPTED, merged=[MERGED], weights=[1.0],
        )  # fmt: skip
        self.tell("merge", cycle, "version", version)
        self.close("merge", cycle)

    def end(self) -> None:
        ended = run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_COMPLETED, final_version=1)
        self.tell("run", 0, "ended", ended)
        deposit = run_pb2.ExpertDeposited(run=RUN, expert_id="medical-1", domain="medical", expert=state(1))
        self.tell("library", 0, "deposited", deposit, "medical-1")


def a_run() -> Story:
    """Cycle 1 is over, in cycle 2 one of two validators has reported."""
    story = Story()
    story.begin()
    story.first_windows(1)
    story.validate(1)
    story.close("validate", 1)
    story.merge(1)
    story.first_windows(2)
    story.validate(2)
    return story
