"""A broker in miniature for the state machine: one message per fact, a sequence per stream, a clock that is told."""

from __future__ import annotations

from dataclasses import dataclass, field

from connito.bus.streams import stream_of
from connito.protocol.beacon import secret_digest
from connito.service.engine import Decision
from connito.v1 import cycle_pb2, run_pb2
from connito.v1.artifacts_pb2 import REALM_PUBLIC, ArtifactRef
from connito.wire.facts import Fact, RunFacts
from connito.wire.subjects import FactKey, fact, ingress
from google.protobuf.message import Message

from services.coordinator.handlers import CloseWindow, PublishFact

RUN = "r1"
THETA_0 = ArtifactRef(digest="0" * 64, size=1000, media_type="application/octet-stream", realm=REALM_PUBLIC)


def theta(version: int) -> ArtifactRef:
    """A state to publish."""
    return ArtifactRef(digest=f"{version:064x}", size=1000, realm=REALM_PUBLIC)


def secret(validator: str, cycle: int) -> bytes:
    return f"{validator}/{cycle}".encode().ljust(32, b".")


@dataclass
class World:
    """What the broker stores of one run."""

    cycles: int = 2
    min_miners: int = 1
    min_validators: int = 1
    improvement: float = 0.0
    now: int = 1_000_000
    log: list[Fact] = field(default_factory=list)
    sequences: dict[str, int] = field(default_factory=dict)
    facts: RunFacts = field(default_factory=lambda: RunFacts(RUN))

    def spec(self) -> run_pb2.RunSpec:
        windows = run_pb2.WindowPolicy(
            min_miners=self.min_miners,
            min_validators=self.min_validators,
            floor_seconds=1,
            ceiling_seconds=100,
            assemble_seconds=50,
        )
        spec = run_pb2.RunSpec(run=RUN, domain="medical", cycles=self.cycles, windows=windows)
        spec.holdout.domain = "medical"
        if self.improvement:
            spec.objective.improvement = self.improvement
        return spec

    def publish(self, section: str, cycle: int, kind: str, message: Message, id_: str = "") -> bool:
        """What `Bus.publish_fact` does: the first message on a subject stands."""
        if self.facts.has(section, cycle, kind, id_):
            return False
        self._store(stream_of(fact(RUN, section, cycle, kind, id_)), FactKey(section, cycle, kind, id_), message)
        return True

    def say(self, miner: str, kind: str, cycle: int, message: Message) -> int:
        """What a miner publishes. Returns the sequence in INGRESS."""
        return self._store(stream_of(ingress(RUN, miner, kind)), FactKey("ingress", cycle, kind, miner), message)

    def _store(self, stream: str, key: FactKey, message: Message) -> int:
        sequence = self.sequences.get(stream, 0) + 1
        self.sequences[stream] = sequence
        stored = Fact(RUN, key, message, key.id, stream, sequence, self.now)
        self.log.append(stored)
        self.facts.add(stored)
        return sequence

    def perform(self, decision: Decision) -> None:
        """Do what was decided, at most once each."""
        for action in decision.actions:
            match action.payload:
                case PublishFact(section, cycle, kind, message):
                    self.publish(section, cycle, kind, message)
                case CloseWindow(window, cycle, stream, cause):
                    message = cycle_pb2.WindowClosed(
                        run=RUN,
                        cycle=cycle,
                        window=cycle_pb2.Window.Value(f"WINDOW_{window.upper()}"),
                        stream=stream,
                        last_sequence=self.sequences.get(stream, 0),
                        cause=cause,
                    )
                    self.publish(window, cycle, "closed", message)

    def create(self) -> None:
        self.publish("run", 0, "created", run_pb2.RunCreated(spec=self.spec()))

    def select(self) -> None:
        self.publish("run", 0, "selected", run_pb2.SelectionMade(run=RUN, initial_state=THETA_0))

    def enrol(self, miner: str) -> None:
        self.publish("run", 0, "miner", run_pb2.MinerEnrolled(run=RUN, miner=miner), miner)

    def join(self, validator: str) -> None:
        self.publish("run", 0, "validator", run_pb2.ValidatorJoined(run=RUN, validator=validator), validator)

    def cancel(self) -> None:
        ended = run_pb2.RunEnded(run=RUN, outcome=run_pb2.RUN_OUTCOME_CANCELLED)
        self.publish("run", 0, "ended", ended)

    def train(self, miner: str, cycle: int) -> None:
        self.say(miner, "trained", cycle, cycle_pb2.TrainingFinished(run=RUN, cycle=cycle))

    def commit_seed(self, validator: str, cycle: int) -> None:
        digest = secret_digest(RUN, cycle, validator, secret(validator, cycle))
        message = cycle_pb2.SeedCommitted(run=RUN, cycle=cycle, validator=validator, digest=digest)
        self.publish("train", cycle, "seed", message, validator)

    def reveal_seed(self, validator: str, cycle: int, value: bytes | None = None) -> None:
        revealed = secret(validator, cycle) if value is None else value
        message = cycle_pb2.SeedRevealed(run=RUN, cycle=cycle, validator=validator, secret=revealed)
        self.publish("validate", cycle, "seed", message, validator)

    def report(self, validator: str, cycle: int) -> None:
        message = cycle_pb2.ScoreReport(run=RUN, cycle=cycle, validator=validator)
        self.publish("validate", cycle, "report", message, validator)

    def commit(self, miner: str, cycle: int) -> None:
        """A commitment and the committer's acceptance of it."""
        sequence = self.say(miner, "commitment", cycle, cycle_pb2.Commitment(run=RUN, cycle=cycle, digest=b"d" * 32))
        message = cycle_pb2.CommitmentAccepted(run=RUN, cycle=cycle, miner=miner, ingress_sequence=sequence)
        self.publish("commit", cycle, "accepted", message, miner)

    def reveal(self, miner: str, cycle: int) -> None:
        """A reveal and the committer's acceptance of it."""
        sequence = self.say(miner, "reveal", cycle, cycle_pb2.Reveal(run=RUN, cycle=cycle))
        submission = cycle_pb2.Submission(miner=miner, reveal_sequence=sequence, origin_cycle=cycle)
        message = cycle_pb2.RevealAccepted(run=RUN, cycle=cycle, submission=submission)
        self.publish("submit", cycle, "accepted", message, miner)

    def settle(self, window: str, cycle: int) -> None:
        """What the committer writes once a window is closed."""
        closed = self.facts.window(window, cycle).closed
        if closed is None:
            return
        message = cycle_pb2.WindowSettled(run=RUN, cycle=cycle, last_sequence=closed.last_sequence)
        for miner, accepted in self.facts.window(window, cycle).accepted.items():
            if isinstance(accepted.message, cycle_pb2.CommitmentAccepted):
                if accepted.message.ingress_sequence <= closed.last_sequence:
                    message.committed.append(miner)
            elif isinstance(accepted.message, cycle_pb2.RevealAccepted):
                message.submissions.append(accepted.message.submission)
        self.publish(window, cycle, "settled", message)

    def merge(self, cycle: int) -> None:
        message = cycle_pb2.VersionPublished(run=RUN, cycle=cycle, version=cycle, parent=cycle - 1, state=theta(cycle))
        message.gate_losses.add(domain="medical", before=3.0, after=2.4, tokens=64)
        self.publish("merge", cycle, "version", message)
